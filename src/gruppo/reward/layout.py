"""Rewards for the layout of a completion: think and answer tags, step markers.

They read the text only and cannot fail: a completion that does not keep the layout scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.types import Completion, Problem

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_STRICT = re.compile(r"\s*<think>\n.*\n</think>\n<answer>\n.*\n</answer>\s*", re.DOTALL)
_LOOSE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_OPEN_R1 = re.compile(
    r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE
)
_STEP = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    r"""1 if the text is one think block, then one answer block, and nothing else; else 0.

    Each tag exactly once, in order, only white space around the blocks. With ``newlines`` every
    tag stands on its own line (``<think>\n..\n</think>\n<answer>\n..\n</answer>``), the layout of
    DeepSeek-R1 (arXiv 2501.12948); without, any white space or none is fine. ``opened``: the
    prompt already ends with ``<think>``, so the completion starts inside the thinking.

    Example:
        >>> from gruppo.types import Completion, Problem
        >>> row = Completion(tokens=(), logp=(), mask=(), version=(), finish="stop",
        ...                  text="<think>2 and 2</think> <answer>4</answer>")
        >>> problem = Problem(id="a", prompt=())
        >>> Format(newlines=False)(problem, [row]), Format()(problem, [row])
        ([1.0], [0.0])
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["format"] = "format"
    newlines: bool = True
    opened: bool = False

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Grade ``completions``; the problem is not read."""
        return [self._grade(completion.text) for completion in completions]

    def _grade(self, text: str) -> float:
        if self.opened:
            text = ("<think>\n" if self.newlines else "<think>") + text.lstrip("\n")
        if any(text.count(tag) != 1 for tag in _TAGS):
            return 0.0
        return float((_STRICT if self.newlines else _LOOSE).fullmatch(text) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenR1Format:
    """Open-R1's format reward, for parity with its runs.

    Its anchors match at line ends, so extra text after the answer block and nested tags pass;
    ``Format`` refuses both.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["open_r1_format"] = "open_r1_format"

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Grade ``completions``; the problem is not read."""
        return [float(_OPEN_R1.match(c.text) is not None) for c in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class TagCount:
    r"""A quarter for each of four tags, with its line breaks, that occurs exactly once (Open-R1).

    The patterns are ``<think>\n``, ``\n</think>\n``, ``\n<answer>\n`` and ``\n</answer>``. It
    leads a model to the layout step by step; ``Format`` then asks for the whole. Without
    ``newlines`` the bare tags count.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["tag_count"] = "tag_count"
    newlines: bool = True

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Grade ``completions``; the problem is not read."""
        lined = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
        patterns = lined if self.newlines else _TAGS
        return [0.25 * sum(c.text.count(p) == 1 for p in patterns) for c in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningSteps:
    """min(1, count / ``target``) of step markers: "Step 1:", "1.", bullets, "First," ... (Open-R1).

    English only, and easy to game: use it to start a base model, not as a task reward.

    Raises:
        ValueError: ``target`` below 1.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["reasoning_steps"] = "reasoning_steps"
    target: int = 3

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"reasoning_steps.target = {self.target}: it must be at least 1")

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        """Grade ``completions``; the problem is not read."""
        return [min(1.0, len(_STEP.findall(c.text)) / self.target) for c in completions]
