"""Randomness by key: hashes, draws and permutations that depend on their key and nothing else.

No global generator and no stored generator state: the same key gives the same values in every
Python version, process and order of calls. It is not cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar, final

import torch
from jaxtyping import Int
from torch import Tensor

T = TypeVar("T")
WORD = 1 << 64


def hash64(*parts: str | int) -> int:
    """Hash ``parts`` to an integer in [0, 2**64); lengths are hashed too, so no two lists collide.

    >>> hash64("a", "bc") == hash64("ab", "c")
    False
    """
    state = blake2b(digest_size=8)
    for part in parts:
        # A lone surrogate cannot be written as UTF-8, but a hash must not fail on any text.
        data = str(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return int.from_bytes(state.digest(), "little")


@final
class Draws:
    """A sequence of uniform draws under one key, for code that needs a varying number of them.

    >>> Draws("demo", 1).below(10) == Draws("demo", 1).below(10)
    True
    """

    __slots__ = ("_count", "_key")

    def __init__(self, *key: str | int) -> None:
        self._key = hash64(*key).to_bytes(8, "little")
        self._count = 0

    def below(self, bound: int) -> int:
        """Uniform integer in [0, bound): values past the last whole multiple are drawn again."""
        assert bound > 0, "an empty range has nothing to draw"
        limit = WORD - WORD % bound
        while True:
            self._count += 1
            counter = self._count.to_bytes(8, "little")
            digest = blake2b(counter, digest_size=8, key=self._key).digest()
            value = int.from_bytes(digest, "little")
            if value < limit:
                return value % bound

    def between(self, low: int, high: int) -> int:
        """Uniform integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """One of ``items``, uniformly."""
        return items[self.below(len(items))]

    def pick(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different positions of ``items``, in random order."""
        assert count <= len(items), "cannot pick more than there are"
        moved: dict[int, int] = {}  # Fisher-Yates on positions, without a copy of the items
        places = []
        for index in range(count):
            other = index + self.below(len(items) - index)
            places.append(moved.get(other, other))
            moved[other] = moved.get(index, index)
        return [items[place] for place in places]


def permutation(size: int, *key: str | int) -> Int[Tensor, "size"]:
    """Return ``range(size)`` in the random order of ``key``: 8 bytes an item.

    Items are sorted by a 64-bit hash of (key, item), the SplitMix64 finaliser (Steele, Lea, Flood,
    OOPSLA 2014); ties, one in 2**64 pairs, keep their order.

    >>> sorted(permutation(5, "seed", 0).tolist())
    [0, 1, 2, 3, 4]
    """
    start = _signed(hash64("permutation", *key))
    word = torch.arange(1, size + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + start
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return torch.argsort(word ^ _shifted(word, 31), stable=True)


def _signed(word: int) -> int:
    """The int64 with the same bits as the unsigned ``word``."""
    return word - WORD if word >= WORD // 2 else word


def _shifted(word: Int[Tensor, "size"], bits: int) -> Int[Tensor, "size"]:
    """Logical shift to the right (torch shifts int64 with its sign)."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
