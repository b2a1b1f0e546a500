"""Drawing with shared prompts and continuous batching: the fast path of the local engine.

Every turn decodes one token of all running rows, lets waiting rows take free slots (computing
their prompts, each once), and draws one token for all of them. What is drawn depends on a row's
own key and position alone, so neither on its slot nor on its company, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gruppo.engine.local.schedule import Admission, Row, Schedule
from gruppo.engine.local.store import Decode, Piece, Prefill, Store
from gruppo.engine.sampler import sample, stream, uniforms
from gruppo.model.attention import SHARED
from gruppo.types import Request, Sampling

PREFILL_TOKENS = 2048
"""Prompt tokens computed in one forward pass: bounds the memory of activations."""

Spoken = Callable[[list[list[int]]], list[bool]]
"""Which of the rows' tokens so far end in a stop string."""

Step = Callable[[Tensor, Tensor, Decode], Tensor]
"""Logits [N, V] after tokens [N] at positions [N], and their keys and values in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a row has drawn; ``stopped``: by a stop token or string, else by its limit."""

    tokens: list[int]
    logp: list[float]
    stopped: bool
    aborted: bool = False


@final
class Slots:
    """The running rows' state, by slot, and the tokens they have drawn."""

    def __init__(self, device: torch.device) -> None:
        def none(dtype: torch.dtype) -> Tensor:
            return torch.empty(0, dtype=dtype, device=device)

        self.stream, self.offset, self.limit = (none(torch.long) for _ in range(3))
        self.prompt_length, self.own_length = none(torch.long), none(torch.long)
        self.tokens, self.logp = (none(dtype)[:, None] for dtype in (torch.long, torch.float32))

    def __len__(self) -> int:
        return len(self.stream)

    def add(self, rows: Sequence[Row], requests: Sequence[Request], *, columns: int) -> None:
        """Append rows that have drawn nothing; at most ``columns`` tokens each."""
        asked = [requests[row.request] for row in rows]
        fresh = [
            [stream(a.key, row.sample) for a, row in zip(asked, rows, strict=True)],
            [a.offset for a in asked],
            [row.limit for row in rows],
            [len(a.tokens) for a in asked],
            [0] * len(rows),
        ]
        device = self.stream.device
        held = (self.stream, self.offset, self.limit, self.prompt_length, self.own_length)
        self.stream, self.offset, self.limit, self.prompt_length, self.own_length = (
            torch.cat([old, torch.tensor(new, device=device)])
            for old, new in zip(held, fresh, strict=True)
        )
        shape = (len(rows), columns)
        self.tokens = torch.cat([self._wide(self.tokens, columns), self.tokens.new_zeros(shape)])
        self.logp = torch.cat([self._wide(self.logp, columns), self.logp.new_zeros(shape)])

    def uniforms(self) -> Float[Tensor, "N"]:
        """The numbers that draw the next token of each row."""
        return uniforms(self.stream, self.offset + self.own_length)

    def write(self, token: Int[Tensor, "N"], logp: Float[Tensor, "N"]) -> None:
        """Add one token to every row."""
        rows = torch.arange(len(self), device=token.device)
        self.tokens[rows, self.own_length] = token
        self.logp[rows, self.own_length] = logp
        self.own_length = self.own_length + 1

    def last(self) -> Int[Tensor, "N"]:
        """The token drawn last by each row."""
        return self.tokens.gather(1, self.own_length[:, None] - 1).squeeze(1)

    def running(self) -> list[list[int]]:
        """Tokens drawn so far by each row."""
        lengths = self.own_length.tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]

    def take(self, slot: int, *, stopped: bool, aborted: bool = False) -> Drawn:
        """What the row in ``slot`` has drawn."""
        length = int(self.own_length[slot])
        return Drawn(
            tokens=self.tokens[slot, :length].tolist(),
            logp=self.logp[slot, :length].tolist(),
            stopped=stopped,
            aborted=aborted,
        )

    def move(self, moves: Sequence[tuple[int, int]], left: int) -> None:
        """Move rows (from, to), and keep the first ``left``."""
        keep = list(range(left))
        for source, target in moves:
            keep[target] = source
        index = torch.tensor(keep, dtype=torch.long, device=self.stream.device)
        self.stream, self.offset, self.limit = (
            held[index] for held in (self.stream, self.offset, self.limit)
        )
        self.prompt_length, self.own_length = self.prompt_length[index], self.own_length[index]
        self.tokens, self.logp = self.tokens[index], self.logp[index]

    @staticmethod
    def _wide(held: Tensor, columns: int) -> Tensor:
        wide = held.new_zeros((len(held), columns))
        wide[:, : held.shape[1]] = held
        return wide


@final
class Drawing:
    """One call of ``generate``: rows in, what they drew out.

    ``step`` computes decode steps in place of the model's own forward.
    """

    def __init__(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        schedule: Schedule,
        *,
        sampling: Sampling,
        store: Store,
        spoken: Spoken | None,
        step: Step | None = None,
    ) -> None:
        self._model = model
        self._step = step or self._forward_step
        self._requests = requests
        self._schedule = schedule
        self._sampling = sampling
        self._store = store
        self._spoken = spoken
        self._device = next(model.parameters()).device
        self._slots = Slots(self._device)
        self._ends = torch.tensor(sampling.stop_tokens, dtype=torch.long, device=self._device)
        self._decode: Decode | None = None
        self._first: dict[int, Tensor] = {}
        self.drawn: dict[Row, Drawn] = {}

    def turn(self) -> None:
        """Draw one token of every row that runs or can start to."""
        logits = [self._next_logits()] if len(self._slots) else []
        if admitted := self._schedule.admit():
            logits.append(self._start(admitted))
            self._decode = None
        every = torch.cat(logits) if len(logits) > 1 else logits[0]
        token, logp = sample(every, self._slots.uniforms(), self._sampling)
        self._slots.write(token, logp)
        stopped = (token[:, None] == self._ends).any(-1)
        if self._spoken is not None:
            said = self._spoken(self._slots.running())
            stopped |= torch.tensor(said, dtype=torch.bool, device=self._device)
        self._retire(stopped)

    def abort(self) -> None:
        """Take what the running rows have, and start no other."""
        for slot, row in enumerate(self._schedule.rows):
            self.drawn[row] = self._slots.take(slot, stopped=False, aborted=True)

    def _retire(self, stopped: Bool[Tensor, "N"]) -> None:
        """Let rows go that stopped or reached their limit."""
        done = stopped | (self._slots.own_length >= self._slots.limit)
        if not bool(done.any()):
            return
        ended = done.nonzero().squeeze(1).tolist()
        by_stop = stopped.tolist()
        for slot in ended:
            row = self._schedule.rows[slot]
            self.drawn[row] = self._slots.take(slot, stopped=by_stop[slot])
        moves = self._schedule.finish(ended)
        self._slots.move(moves, len(self._schedule.rows))
        self._store.move(moves)
        self._decode = None

    def _next_logits(self) -> Float[Tensor, "N V"]:
        """Logits after the last token of every running row."""
        slots = self._slots
        if self._decode is None:
            places = [self._schedule.place(row) for row in self._schedule.rows]
            self._decode = Decode.of(self._store, places, slots.prompt_length, slots.own_length - 1)
        else:
            self._decode.advance()
        return self._step(slots.last(), self._decode.positions, self._decode)

    def _start(self, admitted: Sequence[Admission]) -> Float[Tensor, "M V"]:
        """Compute the new rows' prompts, where they are not held yet; logits of first tokens."""
        columns = max(self._slots.tokens.shape[1], *(a.row.limit for a in admitted))
        self._slots.add([a.row for a in admitted], self._requests, columns=columns)
        fresh = {a.place: self._requests[a.row.request].tokens for a in admitted if a.is_first}
        for batch in _pieces(fresh):
            self._prefill(batch, fresh)
        return torch.stack([self._first[a.place] for a in admitted])

    def _prefill(self, pieces: tuple[Piece, ...], prompts: dict[int, tuple[int, ...]]) -> None:
        ids = [prompts[piece.place][piece.start : piece.stop] for piece in pieces]
        tokens = torch.tensor([token for part in ids for token in part], device=self._device)
        at = [position for piece in pieces for position in range(piece.start, piece.stop)]
        ends = [piece.span.stop - 1 for piece in pieces]
        logits = forward(
            self._model,
            tokens[None],
            torch.tensor(at, device=self._device)[None],
            Prefill(self._store, pieces),
            keep=torch.tensor(ends, device=self._device),
        )[0]
        for piece, row in zip(pieces, logits, strict=True):
            self._first[piece.place] = row  # of the last piece in the end

    def _forward_step(self, tokens: Tensor, positions: Tensor, step: Decode) -> Tensor:
        return forward(self._model, tokens[:, None], positions[:, None], step)[:, -1]


def forward(
    model: nn.Module,
    tokens: Int[Tensor, "B Q"],
    positions: Int[Tensor, "B Q"],
    step: Prefill | Decode,
    *,
    keep: Tensor | int = 1,
) -> Float[Tensor, "B K V"]:
    """Logits at the positions to ``keep``; keys and values go where ``step`` says."""
    step.store.step = step
    output = model(
        input_ids=tokens,
        position_ids=positions,
        # four dimensions: transformers takes it as it is, and makes no mask of its own
        attention_mask=torch.zeros(1, 1, 1, 1, device=tokens.device),
        past_key_values=step.store.cache,
        use_cache=True,
        logits_to_keep=keep,
        **{SHARED: step},
    )
    return output.logits


def _pieces(prompts: dict[int, tuple[int, ...]]) -> list[tuple[Piece, ...]]:
    """Prompts cut into packed rows of at most ``PREFILL_TOKENS`` tokens."""
    batches: list[list[Piece]] = [[]]
    used = 0
    for place, tokens in prompts.items():
        start = 0
        while start < len(tokens):
            if used == PREFILL_TOKENS:
                batches.append([])
                used = 0
            stop = min(len(tokens), start + PREFILL_TOKENS - used)
            batches[-1].append(Piece(place=place, start=start, stop=stop, first=used))
            used += stop - start
            start = stop
    return [tuple(batch) for batch in batches if batch]
