"""Completions drawn while activations are kept, and training passes over them."""

from dataclasses import dataclass

import torch
from torch import nn

from gruppo.engine import LocalEngine
from gruppo.model import Activations, completion_logp, multiplying
from gruppo.model.activations import Known
from gruppo.model.decoder import find_decoder
from gruppo.model.packing import pack
from gruppo.types import Completion, Request, Sampling
from support.engines import letters, unequal_groups

ROOM = 2**24
STOPS = (5, 11, 17, 23, 29)
PROMPTS = 9 + 4 + 13 + 2
"""Tokens of all prompts of ``unequal_groups``, of which nothing is kept."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn, as the training pass takes it."""

    prompts: list[tuple[int, ...]]
    tokens: torch.Tensor
    counts: list[int]
    completions: list[Completion]

    @classmethod
    def of(cls, requests: list[Request], groups: list[tuple[Completion, ...]]) -> "Drawn":
        rows = [completion for group in groups for completion in group]
        tokens = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
        for row, completion in enumerate(rows):
            tokens[row, : len(completion.tokens)] = torch.tensor(completion.tokens)
        return cls(
            [r.tokens for r, group in zip(requests, groups, strict=True) for _ in group],
            tokens,
            [len(row.tokens) for row in rows],
            rows,
        )

    def known(self, activations: Activations, model: nn.Module) -> Known | None:
        return activations.find(
            pack(self.prompts, self.tokens, self.counts),
            self.prompts,
            self.tokens,
            self.counts,
            decoder=find_decoder(model),
        )


def draw(model: nn.Module, activations: Activations | None, **settings: object) -> Drawn:
    """Rows that end at different steps, more than run at once, in groups of unequal size."""
    options = {"max_rows": 4, "products": "native"} | settings
    engine = LocalEngine(model, letters, pad_token=0, activations=activations, **options)
    requests = unequal_groups()
    sampling = Sampling(max_tokens=40, stop_tokens=STOPS)
    return Drawn.of(requests, engine.generate(requests, sampling))


def outcome(
    model: nn.Module, drawn: Drawn, activations: Activations | None, *, half: bool = False
) -> dict[str, torch.Tensor]:
    """Log-probabilities and all gradients of a weighted sum."""
    torch.manual_seed(1)
    weights = torch.randn(drawn.tokens.shape)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half), multiplying("native"):
        scored = completion_logp(
            model,
            drawn.prompts,
            drawn.tokens,
            torch.tensor(drawn.counts),
            packed=True,
            fused=True,
            activations=activations,
        )
        (scored.logp * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logp": scored.logp.detach()} | grads


def opened(size: int = ROOM) -> Activations:
    """With so much room, taking what is drawn."""
    activations = Activations(size)
    activations.open()
    return activations
