"""What is wrong with a recipe, in words a user can act on.

Every mistake names the key path, the value found there, the reason, and where one exists the
nearest valid name. Nothing here knows what a recipe contains.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_MAX_VALUE_TEXT: Final = 60  # characters of a value worth repeating in an error
_NOTHING: Final = object()  # "no value stands there", which is not the same as None


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake: where it is (``train.steps``), the value as text ("" if none), and why.

    Example:
        >>> print(Mistake(path="train.step", value="3", reason="unknown key"))
        train.step = 3: unknown key
    """

    path: str
    value: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.path} = {self.value}" if self.value else self.path
        return f"{where}: {self.reason}" if where else self.reason


class RecipeError(ValueError):
    """A recipe that cannot be used; ``mistakes`` holds everything wrong with it at once."""

    def __init__(self, mistakes: Sequence[Mistake], source: str = "recipe") -> None:
        assert mistakes, "an error has at least one mistake"
        self.mistakes = tuple(mistakes)
        self.source = source
        count = len(self.mistakes)
        head = f"{source}: {count} mistake{'s' if count > 1 else ''}"
        super().__init__("\n".join([head, *(f"  {mistake}" for mistake in self.mistakes)]))


def mistake(path: str, reason: str, value: object = _NOTHING) -> Mistake:
    """Make a mistake, with ``value`` (if given) written the way a recipe would write it."""
    text = "" if value is _NOTHING else show(value)
    return Mistake(path=path, value=text, reason=reason)


def show(value: object) -> str:
    """``value`` as short text: strings quoted, long ones cut.

    Example:
        >>> show("a" * 100)[-4:], show(True), show(3)
        ('aaa…', 'true', '3')
    """
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_TEXT else text[: _MAX_VALUE_TEXT - 1] + "…"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, or None if none comes close.

    Example:
        >>> nearest("step", ["steps", "seed"])
        'steps'
        >>> nearest("zzz", ["steps", "seed"])
    """
    folded = {entry.casefold().replace("-", "_"): entry for entry in known}
    wanted = str(name).casefold().replace("-", "_")
    found = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def did_you_mean(name: object, known: Sequence[str], noun: str) -> str:
    """``unknown <noun>; did you mean "x"?``, or the list of known names if none is near."""
    close = nearest(name, known)
    if close is not None:
        return f'unknown {noun}; did you mean "{close}"?'
    return f"unknown {noun}; known: {', '.join(sorted(known)) or '(none)'}"
