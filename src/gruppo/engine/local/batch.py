"""Which rows run together, and the state of the rows that run.

A wave is a set of rows decoded in one padded batch. Rows that end leave the batch at once; the
wave keeps what they drew. This module calls no model and draws no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.engine.local.schedule import Row
from gruppo.engine.sampler import stream, uniforms
from gruppo.types import Request

_PREFILL_TOKENS = 16384  # padded prompt tokens of a wave: bounds the memory of its one prefill


def plan_waves(
    requests: Sequence[Request], limits: Sequence[int], *, max_rows: int
) -> list[list[Row]]:
    """Split the rows of all requests into waves of at most ``max_rows`` rows.

    A request's rows stay in one wave if they fit one. Requests of similar prompt length share a
    wave, because shorter prompts are padded. Requests whose limit is 0 have no rows.
    """
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    waves: list[list[Row]] = []
    free = width = prompts = 0
    for index in order:
        if limits[index] == 0:
            continue
        rows = [
            Row(request=index, sample=sample, limit=limits[index])
            for sample in range(requests[index].num_samples)
        ]
        for first in range(0, len(rows), max_rows):
            part = rows[first : first + max_rows]
            if len(part) > free or (prompts + 1) * width > _PREFILL_TOKENS:
                waves.append([])
                free, width, prompts = max_rows, len(requests[index].tokens), 0
            waves[-1].extend(part)
            free -= len(part)
            prompts += 1
    return waves


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The distinct prompts of a wave, padded on the left to ``W`` columns.

    ``source`` [R] says which of the ``D`` prompts a row of the wave starts from.
    """

    tokens: Int[Tensor, "D W"]
    mask: Bool[Tensor, "D W"]
    positions: Int[Tensor, "D W"]
    source: Int[Tensor, "R"]

    @staticmethod
    def of(
        rows: Sequence[Row], requests: Sequence[Request], *, pad_token: int, device: torch.device
    ) -> Prompts:
        """Collect them; requests with equal prompts share one."""
        index: dict[tuple[int, ...], int] = {}
        source = [index.setdefault(requests[row.request].tokens, len(index)) for row in rows]
        width = max(len(prompt) for prompt in index)
        tokens = torch.tensor([(pad_token,) * (width - len(p)) + p for p in index], device=device)
        length = torch.tensor([len(prompt) for prompt in index], device=device)
        position = torch.arange(width, device=device) - (width - length)[:, None]
        return Prompts(
            tokens=tokens,
            mask=position >= 0,
            positions=position.clamp(min=0),
            source=torch.tensor(source, device=device),
        )


@final
class Wave:
    """What the rows of a wave have drawn, and which of them still run.

    ``rows`` [N] are the wave's row numbers in the order in which the batch holds them; that order
    changes as rows end. Everything of the shape [N] follows it.
    """

    def __init__(self, rows: Sequence[Row], requests: Sequence[Request], prompts: Prompts) -> None:
        device, count = prompts.tokens.device, len(rows)
        self.drawn = 0
        self.rows = torch.arange(count, device=device)
        self._width = prompts.tokens.shape[1]
        columns = max(row.limit for row in rows)
        self._limit = torch.tensor([row.limit for row in rows], device=device)
        self._next_limit = min(row.limit for row in rows)
        self._stream = torch.tensor(
            [stream(requests[row.request].key, row.sample) for row in rows], device=device
        )
        self._offset = torch.tensor([requests[row.request].offset for row in rows], device=device)
        self._start = prompts.positions[:, -1][prompts.source] + 1
        generated = torch.ones((count, columns), dtype=torch.bool, device=device)
        self._mask = torch.cat([prompts.mask[prompts.source], generated], dim=1)
        self._tokens = torch.zeros((count, columns), dtype=torch.long, device=device)
        self._logp = torch.zeros((count, columns), device=device)
        self._length = torch.zeros(count, dtype=torch.long, device=device)
        self._stopped = torch.zeros(count, dtype=torch.bool, device=device)

    def uniforms(self) -> Float[Tensor, "N"]:
        """The numbers that draw the next token of each running row."""
        return uniforms(self._stream, self._offset + self.drawn)

    def positions(self) -> Int[Tensor, "N 1"]:
        """Position ids of the tokens drawn last, as the model counts them (prompt included)."""
        return (self._start + self.drawn - 1)[:, None]

    def mask(self) -> Bool[Tensor, "N C"]:
        """Attention mask over the prompt's columns and all tokens drawn."""
        return self._mask[:, : self._width + self.drawn]

    def write(self, token: Int[Tensor, "N"], logp: Float[Tensor, "N"]) -> None:
        """Add one token to every running row."""
        self._tokens[self.rows, self.drawn] = token
        self._logp[self.rows, self.drawn] = logp
        self.drawn += 1

    def running(self) -> list[list[int]]:
        """Tokens drawn so far by each running row."""
        return self._tokens[self.rows, : self.drawn].tolist()

    def retire(self, stopped: Bool[Tensor, "N"]) -> Int[Tensor, "M"] | None:
        """Let rows go that stopped or ran out of tokens.

        Returns:
            None if all run on; else which of the N rows the batch holds now: the holes are filled
            with rows from the end, so that a cache need move only those.
        """
        done = stopped
        if self.drawn >= self._next_limit:
            done = stopped | (self._limit <= self.drawn)
        if not bool(done.any()):
            return None
        self._length[self.rows[done]] = self.drawn
        self._stopped[self.rows[done]] = stopped[done]
        keep = _fill_holes(done)
        self.rows, self._start, self._offset, self._stream, self._limit, self._mask = (
            state[keep]
            for state in (
                self.rows,
                self._start,
                self._offset,
                self._stream,
                self._limit,
                self._mask,
            )
        )
        if len(keep):
            self._next_limit = int(self._limit.min())
        return keep

    def results(self) -> list[tuple[list[int], list[float], bool]]:
        """Tokens, log-probabilities and whether it stopped, of every row in the wave's order."""
        lengths, stopped = self._length.tolist(), self._stopped.tolist()
        tokens, logp = self._tokens.tolist(), self._logp.tolist()
        return [
            (ids[:length], values[:length], stop)
            for ids, values, length, stop in zip(tokens, logp, lengths, stopped, strict=True)
        ]


def _fill_holes(done: Tensor) -> Tensor:
    """Index [M] of the rows not done, each in its place or, from beyond M, in a hole."""
    count = int((~done).sum())
    keep = torch.arange(count, device=done.device)
    keep[done[:count]] = (~done[count:]).nonzero().squeeze(1) + count
    return keep
