"""Tasks on words: reverse a list, name its last word, count a letter.

A 135M chat model learns the first two almost perfectly within 30 steps, which makes them quick
checks of a whole training run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gruppo.data.keyed import Draws
from gruppo.data.tasks.base import Item, check_range, check_whole
from gruppo.data.tasks.vocabulary import WORDS


def _list_key(words: list[str]) -> tuple[str, ...]:
    """Split key of a list: its words in no order, so that no permutation of it is in training."""
    return (" ".join(sorted(words)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseWords:
    """Write a list of different words in reverse order; lists are separated by comma and space.

    Args:
        count: words in the list, 2 to 20.

    >>> item = ReverseWords()(seed=0, index=0)
    >>> item.answer.split(", ") == item.info["words"][::-1]
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    count: int = 3

    def __post_init__(self) -> None:
        check_whole("count", self.count, least=2, most=20)

    def __call__(self, seed: int, index: int) -> Item:
        """Return list ``index`` of the sequence under ``seed``."""
        words = Draws("reverse_words", seed, index).pick(WORDS, self.count)
        return Item(
            question=f"Write this list in reverse order: {', '.join(words)}",
            answer=", ".join(reversed(words)),
            keys=_list_key(words),
            info={"words": words},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWord:
    """Name the last word of a list of different words.

    Args:
        low: shortest list, at least 2.
        high: longest list, at most 20.

    >>> item = LastWord()(seed=0, index=0)
    >>> item.answer == item.info["words"][-1]
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    low: int = 3
    high: int = 6

    def __post_init__(self) -> None:
        check_range(self.low, self.high, least=2, most=20)

    def __call__(self, seed: int, index: int) -> Item:
        """Return list ``index`` of the sequence under ``seed``."""
        draws = Draws("last_word", seed, index)
        words = draws.pick(WORDS, draws.between(self.low, self.high))
        return Item(
            question=f"What is the last word of this list: {', '.join(words)}?",
            answer=words[-1],
            keys=_list_key(words),
            info={"words": words},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """Count a letter in a word or a phrase; it occurs at least once.

    Args:
        count: words in the phrase, 1 to 5.

    >>> item = Letters()(seed=0, index=0)
    >>> item.answer == str(item.info["text"].count(item.info["letter"]))
    True
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    count: int = 1

    def __post_init__(self) -> None:
        check_whole("count", self.count, least=1, most=5)

    def __call__(self, seed: int, index: int) -> Item:
        """Return phrase ``index`` of the sequence under ``seed``."""
        draws = Draws("letters", seed, index)
        words = draws.pick(WORDS, self.count)
        text = " ".join(words)
        letter = draws.choice(sorted(set(text) - {" "}))
        return Item(
            question=f'How many times does the letter "{letter}" occur in "{text}"?',
            answer=str(text.count(letter)),
            keys=(f"{letter}: {_list_key(words)[0]}",),
            info={"text": text, "letter": letter},
        )
