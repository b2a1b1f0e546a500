"""Before training: does each problem's own answer get the full reward?

A reward that gives the reference answer less than the maximum (another notation, a parser that
drops text, a wrong column) teaches the wrong thing from the first step on. This finds it on a
sample. It does not test what wrong answers get.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gruppo.data.keyed import hash64
from gruppo.data.split import Problems
from gruppo.types import Problem, Score

TOLERANCE = 1e-9
_UNSCORED = "is not scored"


class WrongAnswer(NamedTuple):
    """A problem whose own answer did not score the maximum: its id, answer, and what it got."""

    id: str
    answer: str
    got: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCheck:
    """Result of `check_answers`: how many were scored, how many have no answer, which failed.

    A problem without an answer that the reward cannot score at all is among the failed.
    """

    checked: int
    without_answer: int
    failed: tuple[WrongAnswer, ...]

    @property
    def ok(self) -> bool:
        """True if every answer that was scored got the maximum."""
        return not self.failed

    @property
    def share_failed(self) -> float:
        """Share of the answers that were scored and did not get the maximum."""
        return len(self.failed) / self.checked if self.checked else 0.0

    def text(self) -> str:
        """Tell the result in a few lines, with the ids of up to ten failures.

        >>> print(AnswerCheck(checked=2, without_answer=0, failed=()).text())
        2 of 2 reference answers get the full reward
        """
        passed = self.checked - len(self.failed)
        lines = [f"{passed} of {self.checked} reference answers get the full reward"]
        if self.without_answer:
            lines[0] += f" ({self.without_answer} problems have no answer)"
        lines += [f"  {w.id}: answer {w.answer[:60]!r} {w.got}" for w in self.failed[:10]]
        if len(self.failed) > 10:
            lines.append(f"  ... and {len(self.failed) - 10} more")
        return "\n".join(lines)


def check_answers(
    problems: Problems,
    score: Callable[[Problem, str], Score | float | None],
    *,
    answer_template: str = "{answer}",
    maximum: float = 1.0,
    sample: int = 64,
    seed: int = 0,
) -> AnswerCheck:
    r"""Score the own answers of a sample of problems, written as a completion would be.

    Args:
        problems: the data set.
        score: scores a completion's text; a `Score` counts by its task metric.
        answer_template: the completion; ``{answer}`` is replaced, all else is literal.
        maximum: what a right answer must get.
        sample: how many problems to draw, those without an answer among them; all if there are
            fewer.
        seed: another seed tries others.

    Returns:
        What failed; an exception of ``score`` is a failure with its text, not raised.

    >>> from gruppo.types import Message
    >>> problem = Problem(id="a", prompt=(Message("user", "2 + 2"),), answer="4")
    >>> check_answers([problem], lambda p, text: float(text == "<answer>4</answer>")).text()
    "0 of 1 reference answers get the full reward\n  a: answer '4' scores 0.0 instead of 1.0"
    """
    if "{answer}" not in answer_template:
        raise ValueError(f"answer_template: {answer_template!r} has no {{answer}}; add it")
    if sample < 1:
        raise ValueError(f"sample: {sample} must be at least 1")
    rows = range(len(problems))
    order = heapq.nsmallest(sample, rows, key=lambda row: hash64("check", seed, row))
    chosen = [problems[row] for row in order]
    return _check(chosen, score, answer_template, maximum)


def final_answer(answer: str) -> str:
    r"""The answer itself: of a worked solution (GSM8K's form), what follows the last ``####``.

    >>> final_answer("3 + 4 = 7\n#### 7")
    '7'
    """
    return answer.rpartition("####")[2].strip()


def _check(
    problems: Sequence[Problem],
    score: Callable[[Problem, str], Score | float | None],
    answer_template: str,
    maximum: float,
) -> AnswerCheck:
    failed, checked = [], 0
    for problem in problems:
        answer = final_answer(problem.answer or "")
        try:
            text = _short_of(score(problem, answer_template.replace("{answer}", answer)), maximum)
        except Exception as error:  # a broken reward is what this looks for
            text = f"fails with {error!r}"
        if problem.answer is None and not text.startswith(_UNSCORED):
            continue  # many answers may be right, and the reward knows them without this one
        checked += 1
        if text:
            failed.append(WrongAnswer(problem.id, problem.answer or "", text))
    return AnswerCheck(
        checked=checked, without_answer=len(problems) - checked, failed=tuple(failed)
    )


def _short_of(got: Score | float | None, maximum: float) -> str:
    """Why ``got`` is not the maximum, or "" if it is."""
    reason = ""
    if isinstance(got, Score):
        reason = "" if got.error is None else f" ({got.error.kind}: {got.error.text})"
    value = got.task if isinstance(got, Score) else got
    if value is None:
        return f"{_UNSCORED}{reason}"
    if not abs(value - maximum) <= TOLERANCE * max(1.0, abs(maximum)):
        return f"scores {value} instead of {maximum}{reason}"
    return ""
