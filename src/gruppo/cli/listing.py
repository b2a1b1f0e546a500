"""What ``gruppo recipes`` prints."""

from __future__ import annotations

import re
from typing import Final

from rich.console import Console

from gruppo.objective import PLANNED, PRESETS
from gruppo.recipe import packaged
from gruppo.recipe.source import read

_SENTENCE_END: Final = re.compile(r"(?<=\.)(?<!\bDr\.) ")


def list_recipes(console: Console) -> int:
    """Names of the packaged recipes with the first sentence of each."""
    for name, text in packaged().items():
        _say(console, f"{name:<16} {first_sentence(text)}")
    _say(console, "\nprint one: gruppo recipes NAME    train: gruppo train NAME")
    return 0


def show_recipe(name: str, console: Console) -> int:
    """Text of a packaged recipe."""
    _say(console, read(name).rstrip())
    return 0


def list_presets(console: Console) -> int:
    """Objectives by name, with source and what differs."""
    for name, preset in PRESETS.items():
        _say(console, f"{name:<16} {preset.source}\n{'':<16} {preset.differs}")
    return 0


def list_planned(console: Console) -> int:
    """Variants that cannot be had yet, and what they lack."""
    for name, missing in PLANNED.items():
        _say(console, f"{name:<16} needs {missing}")
    return 0


def first_sentence(text: str) -> str:
    r"""The first sentence of a recipe's opening comment.

    Example:
        >>> first_sentence("# One thing\n# after another. And more.\n\n[model]\n")
        'One thing after another.'
    """
    comment: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    return _SENTENCE_END.split(" ".join(comment), maxsplit=1)[0]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
