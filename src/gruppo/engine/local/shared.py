"""Drawing with shared prompts and continuous batching: the fast path of the local engine.

Every turn decodes one token of all running rows, lets waiting rows take free slots (computing
their prompts, each once), and draws one token for all of them. What is drawn depends on a row's
own key and position alone, so neither on its slot nor on its company, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.engine.local.forward import forward
from gruppo.engine.local.graphs import Replays
from gruppo.engine.local.schedule import Admission, Row, Schedule
from gruppo.engine.local.seats import Seat
from gruppo.engine.local.store import Decode, Piece, Prefill, Store
from gruppo.engine.sampler import Told, draw, stream, uniforms
from gruppo.model.activations import Activations
from gruppo.types import Request, Sampling

PREFILL_TOKENS = 2048
"""Prompt tokens computed in one forward pass: bounds the memory of activations."""

Spoken = Callable[[list[list[int]]], list[bool]]
"""Which of the rows' tokens so far end in a stop string."""

Advance = Callable[[Tensor, Tensor, Decode], Tensor]
"""Logits [N, V] after tokens [N] at positions [N], and their keys and values in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a row has drawn; ``stopped``: by a stop token or string, else by its limit.

    ``kept``: where the activations of its first tokens are.
    """

    tokens: list[int]
    logp: list[float]
    stopped: bool
    kept: list[int] = field(default_factory=list)
    aborted: bool = False


@final
class Slots:
    """The running rows, by slot: on the device what draws the next token, on the host the drawn."""

    def __init__(self, device: torch.device) -> None:
        # stream, offset, prompt_length, own_length, token
        self._state = torch.empty((5, 0), dtype=torch.long, device=device)
        self._limits: list[int] = []
        self._prompts: list[int] = []
        self._tokens: list[list[int]] = []
        self._logp: list[list[float]] = []
        self._kept: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._limits)

    def add(self, rows: Sequence[Row], requests: Sequence[Request]) -> None:
        """Append rows that have drawn nothing."""
        asked = [requests[row.request] for row in rows]
        fresh = [
            [stream(a.key, row.sample) for a, row in zip(asked, rows, strict=True)],
            [a.offset for a in asked],
            [len(a.tokens) for a in asked],
            [0] * len(rows),
            [0] * len(rows),
        ]
        self._state = torch.cat([self._state, torch.tensor(fresh, device=self._state.device)], 1)
        self._limits += [row.limit for row in rows]
        self._prompts += [len(a.tokens) for a in asked]
        self._tokens += [[] for _ in rows]
        self._logp += [[] for _ in rows]
        self._kept += [[] for _ in rows]

    @property
    def prompt_length(self) -> Int[Tensor, "N"]:
        """Tokens of each row's prompt."""
        return self._state[2]

    @property
    def own_length(self) -> Int[Tensor, "N"]:
        """Tokens drawn so far by each row."""
        return self._state[3]

    def uniforms(self) -> Float[Tensor, "N"]:
        """The numbers that draw the next token of each row."""
        return uniforms(self._state[0], self._state[1] + self._state[3])

    def write(self, token: Int[Tensor, "N"], told: Told) -> None:
        """Add one token to every row, on the device and on the host."""
        self._state[3] += 1
        self._state[4] = token
        for slot, (said, value) in enumerate(zip(told.token, told.logp, strict=True)):
            self._tokens[slot].append(said)
            self._logp[slot].append(value)

    def keep(self, first: int) -> None:
        """The activations of every row's last token are kept from ``first`` on."""
        for at, kept in enumerate(self._kept, start=first):
            kept.append(at)

    def last(self) -> Int[Tensor, "N"]:
        """The token drawn last by each row."""
        return self._state[4]

    def running(self) -> list[list[int]]:
        """Tokens drawn so far by each row."""
        return self._tokens

    def seats(self, places: Sequence[int]) -> list[Seat]:
        """The rows as a step that is captured takes them; ``places`` are their prompts'."""
        return [
            Seat(place=place, prompt_length=prompt, own_length=len(tokens) - 1)
            for place, prompt, tokens in zip(places, self._prompts, self._tokens, strict=True)
        ]

    def is_full(self, slot: int) -> bool:
        """Whether the row in ``slot`` has drawn all it may."""
        return len(self._tokens[slot]) >= self._limits[slot]

    def take(self, slot: int, *, stopped: bool, aborted: bool = False) -> Drawn:
        """What the row in ``slot`` has drawn."""
        tokens, logp = self._tokens[slot], self._logp[slot]
        kept = self._kept[slot]
        return Drawn(tokens=tokens, logp=logp, stopped=stopped, kept=kept, aborted=aborted)

    def move(self, moves: Sequence[tuple[int, int]], left: int) -> None:
        """Move rows (from, to), and keep the first ``left``."""
        keep = list(range(left))
        for source, target in moves:
            keep[target] = source
        self._state = self._state[:, torch.tensor(keep, dtype=torch.long).to(self._state.device)]
        self._limits = [self._limits[slot] for slot in keep]
        self._prompts = [self._prompts[slot] for slot in keep]
        self._tokens = [self._tokens[slot] for slot in keep]
        self._logp = [self._logp[slot] for slot in keep]
        self._kept = [self._kept[slot] for slot in keep]


@final
class Drawing:
    """One call of ``generate``: rows in, what they drew out.

    ``advance`` computes decode steps in place of the model's own forward, ``replays`` in place of
    both as long as it can. ``activations`` are those that ``advance`` keeps.
    """

    def __init__(  # noqa: PLR0913 - what to draw, how, and what with
        self,
        model: nn.Module,
        requests: Sequence[Request],
        schedule: Schedule,
        *,
        sampling: Sampling,
        store: Store,
        spoken: Spoken | None,
        advance: Advance | None = None,
        replays: Replays | None = None,
        activations: Activations | None = None,
    ) -> None:
        self._model = model
        self._advance = advance or self._forward_step
        self._requests = requests
        self._schedule = schedule
        self._sampling = sampling
        self._store = store
        self._spoken = spoken
        self._device = next(model.parameters()).device
        self._slots = Slots(self._device)
        self._ends = frozenset(sampling.stop_tokens)
        self._decode: Decode | None = None
        self._replays = replays
        self._activations = activations
        self._is_seated = False
        self._first: dict[int, Tensor] = {}
        self.drawn: dict[Row, Drawn] = {}

    def turn(self) -> None:
        """Draw one token of every row that runs or can start to."""
        logits = [self._next_logits()] if len(self._slots) else []
        if admitted := self._schedule.admit():
            logits.append(self._start(admitted))
            self._changed()
        every = torch.cat(logits) if len(logits) > 1 else logits[0]
        token, _, told = draw(every, self._slots.uniforms(), self._sampling)
        self._slots.write(token, told)
        stopped = [said in self._ends for said in told.token]
        if self._spoken is not None:
            said = self._spoken(self._slots.running())
            stopped = [one or other for one, other in zip(stopped, said, strict=True)]
        self._retire(stopped)

    def abort(self) -> None:
        """Take what the running rows have, and start no other."""
        for slot, row in enumerate(self._schedule.rows):
            self.drawn[row] = self._slots.take(slot, stopped=False, aborted=True)

    def _retire(self, stopped: Sequence[bool]) -> None:
        """Let rows go that stopped or reached their limit."""
        ended = [slot for slot, stop in enumerate(stopped) if stop or self._slots.is_full(slot)]
        if not ended:
            return
        for slot in ended:
            row = self._schedule.rows[slot]
            self.drawn[row] = self._slots.take(slot, stopped=stopped[slot])
        moves = self._schedule.finish(ended)
        self._slots.move(moves, len(self._schedule.rows))
        self._store.move(moves)
        self._changed()

    def _changed(self) -> None:
        """Other rows run than before."""
        self._decode = None
        self._is_seated = False

    def _next_logits(self) -> Float[Tensor, "N V"]:
        """Logits after the last token of every running row."""
        slots = self._slots
        if self._replays is not None:
            logits = self._replayed(self._replays)
            if logits is not None:
                return logits
            self._replays = None
        if self._decode is None:
            places = [self._schedule.place(row) for row in self._schedule.rows]
            self._decode = Decode.of(self._store, places, slots.prompt_length, slots.own_length - 1)
        else:
            self._decode.advance()
        if self._activations is not None:
            self._decode.kept_at = self._activations.reserve(len(slots))
            if self._decode.kept_at is not None:
                slots.keep(self._decode.kept_at)
        return self._advance(slots.last(), self._decode.positions, self._decode)

    def _replayed(self, replays: Replays) -> Tensor | None:
        if not self._is_seated:
            replays.seat(self._slots.seats([self._schedule.place(r) for r in self._schedule.rows]))
            self._is_seated = True
        return replays.logits(self._slots.last())

    def _start(self, admitted: Sequence[Admission]) -> Float[Tensor, "M V"]:
        """Compute the new rows' prompts, where they are not held yet; logits of first tokens."""
        self._slots.add([a.row for a in admitted], self._requests)
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
            self._store,
            Prefill(self._store, pieces),
            tokens[None],
            torch.tensor(at, device=self._device)[None],
            keep=torch.tensor(ends, device=self._device),
        )[0]
        for piece, row in zip(pieces, logits, strict=True):
            self._first[piece.place] = row  # of the last piece in the end

    def _forward_step(self, tokens: Tensor, positions: Tensor, step: Decode) -> Tensor:
        model, store = self._model, self._store
        return forward(model, store, step, tokens[:, None], positions[:, None])[:, -1]


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
