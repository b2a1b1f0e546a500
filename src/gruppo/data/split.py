"""Choosing rows: the held-out split, and the longest prompt that is allowed.

`partition` and `fitting` choose positions. `split` returns lists for a list, and views for anything
else, so that streamed data are split without being held in memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, overload, runtime_checkable

from gruppo.data.keyed import hash64
from gruppo.types import Message, Problem

SPLIT_KEY = "split_key"
# Where problems share keys (3 + 4 in a hundred sentences), a few keys would fill the held-out set
# and measure little: at least this share of all keys is held out.
KEY_SHARE = 0.15


@runtime_checkable
class Problems(Protocol):
    """Problems by position: a list, or rows that are read when asked for."""

    def __len__(self) -> int:
        """Return the number of problems."""
        ...

    def __getitem__(self, index: int, /) -> Problem:
        """Return the problem at ``index`` (0 to len - 1)."""
        ...

    def __iter__(self) -> Iterator[Problem]:
        """Go through all problems in order."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """Some of ``problems``, by position; they are looked up when asked for."""

    problems: Problems
    rows: array

    def __len__(self) -> int:
        """Return the number of problems in the view."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Problem:
        """Return the problem at ``index`` of the view."""
        return self.problems[self.rows[index]]

    def __iter__(self) -> Iterator[Problem]:
        """Go through the view in order."""
        return (self.problems[row] for row in self.rows)


def split_keys(problem: Problem) -> tuple[str, ...]:
    """What ties a problem to others: the values of its ``split_key`` column, or () without one."""
    value = problem.info.get(SPLIT_KEY)
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else (value,)
    return tuple(str(item) for item in items)


def partition(problems: Problems, held_out: int, *, seed: int = 0) -> tuple[array, array]:
    """Positions of the training and of the held-out problems.

    A problem is tied to all problems with the same prompt text, and to those that share a value of
    its ``split_key`` column (text, or a list of texts; own tasks set it). What is tied never
    straddles the split. Sets of equal prompts are held out in the order of the smallest hash of
    (seed, source, id) in them, keys in the order of hash(seed, key): when rows are added, only as
    many held-out ones change as new ones hash below them. Of the problems under a held-out key
    just enough are taken, spread evenly over the keys; **the rest of them are in neither part**.

    Memory: about 300 bytes a row while it works.

    Args:
        problems: the whole data set.
        held_out: how many problems to hold out; 0 holds out none.
        seed: another seed holds out others.

    Raises:
        ValueError: if the data cannot give ``held_out`` problems and leave some to train on.
    """
    total = len(problems)
    if held_out == 0:
        return array("Q", range(total)), array("Q")
    if not 0 < held_out < total:
        raise ValueError(
            f"held_out: {held_out} of {total} problems leaves none to train on, or is negative; "
            f"choose 0 to {max(total - 1, 0)}"
        )
    index = _index(problems, seed)
    chosen = _choose(index, held_out)
    texts = {index.text_of[row] for key in chosen for row in index.rows_of[key]}
    held = set()
    for row, text in enumerate(index.text_of):
        if text in texts or any(key in chosen for key in index.keys_of[row]):
            held.add(row)
    if len(held) == total or len(held) < held_out:
        raise ValueError(
            f"held_out: {held_out} problems cannot be held out of {total}, because equal prompts "
            "and equal split keys stay together; choose fewer, or add different problems"
        )
    test = _spread(index, chosen, held_out)
    return array("Q", (row for row in range(total) if row not in held)), array("Q", sorted(test))


class _Index(NamedTuple):
    """Rows by key, keys by row. Keys: hashes of split keys, or of the text where there are none."""

    keys_of: list[tuple[int, ...]]
    text_of: array
    rows_of: dict[int, list[int]]
    rank_of: dict[int, int]
    row_rank: array


def _index(problems: Problems, seed: int) -> _Index:
    index = _Index([], array("Q"), {}, {}, array("Q"))
    for row in range(len(problems)):
        problem = problems[row]
        text = hash64(*(part for m in problem.prompt for part in (m.role, m.content)))
        rank = hash64(seed, problem.source, problem.id)
        named = [hash64("key", key) for key in split_keys(problem)]
        keys = tuple(named) or (text,)
        index.keys_of.append(keys)
        index.text_of.append(text)
        index.row_rank.append(rank)
        for key in keys:
            index.rows_of.setdefault(key, []).append(row)
            own = hash64(seed, key) if named else rank
            index.rank_of[key] = min(index.rank_of.get(key, own), own)
    return index


def _choose(index: _Index, held_out: int) -> set[int]:
    """Smallest-ranked keys whose rows number ``held_out``, and enough keys to mean something."""
    wanted = min(held_out, math.ceil(KEY_SHARE * len(index.rows_of)))
    chosen: set[int] = set()
    rows: set[int] = set()
    for key in sorted(index.rank_of, key=index.rank_of.__getitem__):
        if len(rows) >= held_out and len(chosen) >= wanted:
            break
        chosen.add(key)
        rows.update(index.rows_of[key])
    return chosen


def _spread(index: _Index, chosen: Collection[int], held_out: int) -> set[int]:
    """``held_out`` rows of the chosen keys: one of each key in turn, smallest rank first."""
    order = sorted(chosen, key=index.rank_of.__getitem__)
    queues = [
        sorted(index.rows_of[key], key=index.row_rank.__getitem__, reverse=True) for key in order
    ]
    taken: set[int] = set()
    while len(taken) < held_out:
        for queue in queues:
            while queue and queue[-1] in taken:
                queue.pop()
            if queue and len(taken) < held_out:
                taken.add(queue.pop())
    return taken


@overload
def split(
    problems: list[Problem], held_out: int, *, seed: int = 0
) -> tuple[list[Problem], list[Problem]]: ...
@overload
def split(problems: Problems, held_out: int, *, seed: int = 0) -> tuple[View, View]: ...
def split(problems: Problems, held_out: int, *, seed: int = 0) -> tuple[Problems, Problems]:
    """Split into (train, held_out); see `partition` for what stays together and is stable.

    A list gives two lists, anything else two views.

    >>> rows = [Problem(id=str(i), prompt=(Message("user", str(i // 2)),)) for i in range(8)]
    >>> train, held_out = split(rows, 2)
    >>> len(train), len(held_out), {p.prompt for p in train} & {p.prompt for p in held_out}
    (6, 2, set())
    """
    train, test = partition(problems, held_out, seed=seed)
    return _take(problems, train), _take(problems, test)


def _take(problems: Problems, rows: array) -> Problems:
    return [problems[row] for row in rows] if isinstance(problems, list) else View(problems, rows)


Encode = Callable[[Sequence[Message]], Sequence[int]]


def fitting(
    problems: Problems,
    encode: Encode,
    max_tokens: int,
    *,
    policy: Literal["drop", "error"] = "drop",
) -> array:
    """Positions of the problems whose prompt has at most ``max_tokens`` tokens.

    A prompt is never cut: half a question has another answer.

    Args:
        problems: a list, or streamed rows.
        encode: prompt messages to token ids (the chat template and its tokens included).
        max_tokens: the limit, ``max_prompt_tokens`` in a recipe.
        policy: "drop" leaves longer ones out, "error" refuses the data set.

    Raises:
        ValueError: under "error" if one is too long (the first is named); under both if none fits.
    """
    if max_tokens < 1:
        raise ValueError(f"max_prompt_tokens: {max_tokens} must be at least 1")
    if policy not in ("drop", "error"):
        raise ValueError(f'prompt policy: {policy!r} is unknown; use "drop" or "error"')
    kept, shortest = array("Q"), math.inf
    for row in range(len(problems)):
        problem = problems[row]
        length = len(encode(problem.prompt))
        shortest = min(shortest, length)
        if length <= max_tokens:
            kept.append(row)
        elif policy == "error":
            raise ValueError(
                f"max_prompt_tokens: problem {problem.id!r} of {problem.source or 'the data'} has "
                f"{length} prompt tokens, the limit is {max_tokens}; raise it or drop such rows"
            )
    if not kept:
        raise ValueError(
            f"max_prompt_tokens: none of {len(problems)} problems fits in {max_tokens} tokens "
            f"(the shortest has {shortest}); raise the limit"
        )
    return kept
