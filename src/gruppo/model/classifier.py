"""Open a sequence classifier (a reward model, say) and compute its logits.

Under the rules of ``source.py``: safetensors only, no code from the model's folder, no weights made
up where the file lacks some. It is never trained here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gruppo.model.packaged import quiet
from gruppo.model.parts import context_length
from gruppo.model.source import check_folder, check_vocabulary, locate, refuse_incomplete


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """An opened classifier in evaluation mode; ``context`` is the most tokens it reads, if any."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_labels: int
    context: int | None


def load_classifier(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Classifier:
    """Open the classifier ``name`` (``owner/model`` on the hub, or a folder) and its tokenizer.

    Raises:
        ValueError: the folder holds pickled weights only, needs its own code or lacks weights
            (those of the head too: then it is no classifier).
        OSError: download or disk failed.
    """
    source = locate(name)
    if Path(source).is_dir():
        check_folder(Path(source))
    with quiet():
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False),
        )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    refuse_incomplete(name, info)
    check_vocabulary(name, model, tokenizer)
    model.to(device).eval().requires_grad_(False)
    return Classifier(
        model=model,
        tokenizer=tokenizer,
        num_labels=int(config.num_labels or 1),
        context=context_length(model),
    )


def classifier_bytes(
    name: str, *, tokens: int, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> tuple[int, int]:
    """Bytes of a classifier's weights, and of a batch of ``tokens`` in its widest layer.

    From its configuration: nothing is loaded. A layer without gradients holds its input, a sum and
    a normed copy, three more of attention, and three matrices as wide as its inner layer.

    Raises:
        ValueError, OSError: the configuration cannot be had.
    """
    source = locate(name)
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    # linear layers of GPT-2's kind store their matrix turned round
    widest = max(max(p.shape) for n, p in model.named_parameters() if ".layer" in n or ".h." in n)
    width = config.get_text_config().hidden_size
    weights = sum(p.nbytes for p in model.parameters())
    return weights, tokens * (6 * width + 3 * widest) * dtype.itemsize


@torch.no_grad()
def logits(classifier: Classifier, rows: Sequence[Sequence[int]]) -> Float[Tensor, "B L"]:
    """Logits [B, labels] in float32 on the host, of token ``rows`` computed as one padded batch.

    A classifier reads the last token that is not padding. Where the model does not say what its
    padding is, an id that no row holds is used, so that the row's own last token is read.
    """
    model = classifier.model
    known = model.config.pad_token_id
    pad = _unused(rows) if known is None else known
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    device = next(model.parameters()).device
    model.config.pad_token_id = pad
    try:
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device))
    finally:
        model.config.pad_token_id = known
    return output.logits.float().cpu()


def _unused(rows: Sequence[Sequence[int]]) -> int:
    used = {token for row in rows for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)
