"""Which completions wait, run and are done: continuous batching over a fixed number of slots.

A completion that ends frees its slot, and the next waiting one takes it at the next token. A
prompt enters with its first completion and leaves with its last; all its completions share it.
Memory is bounded by the slots and, if asked, by a budget of cached tokens. This module is plain
Python: it holds no tensors and calls no model.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from gruppo.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Sample ``sample`` of request ``request``, to be drawn: at most ``limit`` tokens."""

    request: int
    sample: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A row that starts to run in slot ``slot``, after the prompt in place ``place``.

    ``is_first``: the prompt is not computed yet.
    """

    row: Row
    slot: int
    place: int
    is_first: bool


@dataclass(slots=True)
class _Prompt:
    place: int
    length: int


def rows_of(requests: Sequence[Request], limits: Sequence[int]) -> list[Row]:
    """The rows of all requests that may draw at least one token, in order."""
    return [
        Row(request=index, sample=sample, limit=limits[index])
        for index, request in enumerate(requests)
        if limits[index] > 0
        for sample in range(request.num_samples)
    ]


@final
class Schedule:
    """Slots 0 to ``running - 1`` are always taken: a freed one is filled from the end.

    ``max_tokens`` bounds the cached tokens: every prompt that is held counts once, every running
    row its ``limit``. A row that would never fit runs alone.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        requests: Sequence[Request],
        *,
        max_rows: int,
        max_tokens: int | None = None,
    ) -> None:
        self._waiting = deque(rows)
        self._left = Counter(requests[row.request].tokens for row in rows)
        self._requests = requests
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._slots: list[Row] = []
        self._prompts: dict[tuple[int, ...], _Prompt] = {}
        self._free_places: list[int] = []
        self._held = 0
        self.peak_tokens = 0

    @property
    def rows(self) -> Sequence[Row]:
        """The running rows, by slot."""
        return self._slots

    @property
    def is_done(self) -> bool:
        """Whether no row runs or waits."""
        return not self._slots and not self._waiting

    def place(self, row: Row) -> int:
        """Where the prompt of a running row is held."""
        return self._prompts[self._requests[row.request].tokens].place

    def admit(self) -> list[Admission]:
        """Let waiting rows run as long as slots and memory last."""
        admitted = []
        while self._waiting and len(self._slots) < self._max_rows:
            row = self._waiting[0]
            tokens = self._requests[row.request].tokens
            known = self._prompts.get(tokens)
            need = row.limit + (0 if known else len(tokens))
            if self._slots and self._max_tokens and self._held + need > self._max_tokens:
                break
            self._waiting.popleft()
            prompt = known or self._hold(tokens)
            self._held += need
            self.peak_tokens = max(self.peak_tokens, self._held)
            admitted.append(
                Admission(
                    row=row, slot=len(self._slots), place=prompt.place, is_first=known is None
                )
            )
            self._slots.append(row)
        return admitted

    def finish(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Free ``slots``; the last running rows move into the holes.

        Returns:
            (from, to) of every row that changed its slot.
        """
        done = set(slots)
        for slot in done:
            self._release(self._slots[slot])
        left = len(self._slots) - len(done)
        movers = [slot for slot in range(left, len(self._slots)) if slot not in done]
        holes = [slot for slot in sorted(done) if slot < left]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self._slots[target] = self._slots[source]
        del self._slots[left:]
        return moves

    def _hold(self, tokens: tuple[int, ...]) -> _Prompt:
        place = self._free_places.pop() if self._free_places else len(self._prompts)
        prompt = self._prompts[tokens] = _Prompt(place=place, length=len(tokens))
        return prompt

    def _release(self, row: Row) -> None:
        tokens = self._requests[row.request].tokens
        prompt = self._prompts[tokens]
        self._left[tokens] -= 1
        self._held -= row.limit
        if self._left[tokens] == 0:  # no row that waits will ask for it either
            del self._prompts[tokens]
            self._free_places.append(prompt.place)
            self._held -= prompt.length
