r"""Language consistency: the share of a completion's words that are in the target language.

Words are told apart by their *script* (Unicode names) alone. This sees Chinese inside an English
thought, which is what DeepSeek-R1 (arXiv 2501.12948) fought; it cannot see German inside English,
because both are written in Latin letters. It is no language identification.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import ceil
from typing import ClassVar, Literal

from gruppo.types import Completion, Problem

Language = Literal[
    "en", "de", "fr", "es", "it", "pt", "zh", "ja", "ko", "ru", "uk", "ar", "hi", "el", "he", "th"
]

_LATIN = frozenset({"LATIN"})
SCRIPTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt"), _LATIN),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "ru": frozenset({"CYRILLIC"}),
    "uk": frozenset({"CYRILLIC"}),
    "ar": frozenset({"ARABIC"}),
    "hi": frozenset({"DEVANAGARI"}),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "th": frozenset({"THAI"}),
}
# Written without spaces: a run of characters is taken as one word per this many characters.
_CHARS_PER_WORD = {"CJK": 2, "HIRAGANA": 3, "KATAKANA": 4, "THAI": 4}
_NOISE = re.compile(r"\\[a-zA-Z]+|</?\w+>|```.*?```|`[^`\n]*`", re.DOTALL)


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    """Return the first word of a letter's Unicode name ("LATIN", "CJK"); "" for non-letters."""
    if not char.isalpha():
        return ""
    script = unicodedata.name(char, "").split(" ", 1)[0]
    # Greek and mathematical letters in formulas (π, 𝑥) are symbols, whatever the language.
    return "" if script == "MATHEMATICAL" else script


def word_scripts(text: str) -> list[str]:
    r"""Return the script of every word of ``text``, in order.

    Numbers, symbols, LaTeX commands, tags, code and single Latin or Greek letters (variables) are
    no words.

    >>> word_scripts(r"so \frac{1}{2} = x 因此 done")
    ['LATIN', 'CJK', 'LATIN']
    """
    found: list[str] = []
    for script, run in groupby(_NOISE.sub(" ", text), key=_script):
        length = sum(1 for _ in run)
        if not script or (length == 1 and script in {"LATIN", "GREEK"}):
            continue
        found += [script] * ceil(length / _CHARS_PER_WORD.get(script, length))
    return found


def share(is_target: Iterable[bool]) -> float:
    """Return the share of True; 1 if there are no words.

    >>> share([True, True, False, True])
    0.75
    """
    flags = list(is_target)
    return sum(flags) / len(flags) if flags else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConsistency:
    """(words in the target language's script) / (words), over the thinking or the whole text.

    ``where = "thinking"`` reads what stands before ``</think>`` (the whole text if there is none).
    No words: 1. DeepSeek-R1 adds it to the accuracy reward with weight 1 (arXiv 2501.12948).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["language"] = "language"
    language: Language = "en"
    where: Literal["thinking", "all"] = "thinking"

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Grade ``completions``; the problem is not read."""
        scripts = SCRIPTS[self.language]
        return [
            share(script in scripts for script in word_scripts(self._part(completion.text)))
            for completion in completions
        ]

    def _part(self, text: str) -> str:
        if self.where == "all":
            return text
        thinking, closed, _ = text.rpartition("</think>")
        return thinking if closed else text
