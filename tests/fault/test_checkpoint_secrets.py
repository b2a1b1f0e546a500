"""No checkpoint tells the home folder's name, whatever the model's place and the run's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer, tiny_config
from gruppo.cli import main

HOME = "somebody-s-home"
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    number = sum(map(ord, solution_str))
    if number % 4 == 0:
        raise RuntimeError("a fourth of all texts")
    return number % 7 / 7
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that holds the model and the reward."""
    folder = tmp_path / HOME
    (folder / "models").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder / "models" / "mine")
    byte_tokenizer().save_pretrained(folder / "models" / "mine")
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("model", "lora"),
    [("{home}/models/mine", {"model.lora": "{rank = 2}"}), ("~/models/mine", {})],
    ids=["adapter", "whole"],
)
def test_no_file_of_a_run_names_the_home_folder(home: Path, model: str, lora: dict[str, str]):
    from peft import PeftModel

    part = f'{{name = "answer", kind = "function", function = "{home}/rewards.py"}}'
    settings = {
        "model.name": model.format(home=home),
        "record.folder": str(home / "runs"),
        "record.name": "run",
        "train.steps": "1",
        "rollout.prompts_per_step": "2",
        "rollout.group_size": "3",
        "rollout.max_tokens": "6",
        "rollout.filter": "resample",  # and so some groups are buffered
        "rollout.oversample": "3.0",
        "data.held_out": "0",
        "data.train.0.size": "60",
        "reward.parts.answer": part,
        "reward.answer_template": "none",
        **lora,
    }
    given = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    assert main(["train", "quickstart", *given]) == 0
    run = home / "runs" / "run"
    files = [file for file in run.rglob("*") if file.is_file()]
    assert [file for file in files if HOME.encode() in file.read_bytes()] == []
    saved = run / "checkpoints" / "00000001"
    assert "~/rewards.py" in (saved / "state.json").read_text(), "a failure was buffered"
    if lora:
        base = AutoModelForCausalLM.from_pretrained(home / "models" / "mine")
        again = PeftModel.from_pretrained(base, saved / "model")
        assert sum("lora_A" in name for name, _ in again.named_parameters()) == 14
