"""Rewards by a grading model: scores by a rubric, wins within a group, agreement with a reference.

Only what follows ``</think>`` is shown to it, as quoted data (``quoting.py``). A completion that
has no such text, or too much, scores the part's minimum; whatever goes wrong with the grading
model leaves the row unscored. Grading models can be fooled and have tastes (for length, for their
own style): watch the score against held-out problems that need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.reward.answer import gold_text, no_gold
from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import after_thinking
from gruppo.reward.grader import GradingModel, Question, ask, explain
from gruppo.reward.remembered import remembered
from gruppo.reward.service import Lost, Service
from gruppo.reward.verdicts import Choice, Grade
from gruppo.types import Completion, Problem, Score

_RUBRIC = (
    "You grade an answer to a request by the rubric below. The score is a number from {low:g} "
    "(worst) to {high:g} (best). Judge what the answer does, not how long or confident it is.\n\n"
    "Rubric:\n{rubric}"
)
_PAIR = (
    "You compare two answers to one request by the rubric below, and say which is better: "
    '"first", "second", or "tie". Order and length mean nothing.\n\nRubric:\n{rubric}'
)
_VERIFY = (
    "You check whether an answer to a question comes to the same final result as the reference. "
    "The reference is right; do not solve the question anew. Other notation, units written out, "
    "rounding that the question asks for and a different order where order means nothing are "
    'equal. "correct": the one final result given equals the reference in all its parts. '
    '"incorrect": it does not, or parts are missing, or several results are offered. "invalid": '
    "there is no final result (refusal, endless repetition, cut off, another question)."
)
_INVALID = -1.0
_VERDICTS = Choice({"correct": 1.0, "incorrect": 0.0, "invalid": _INVALID})
_WINNERS = Choice({"first": 1.0, "second": 0.0, "tie": 0.5})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A grading model's score by a ``rubric``, from 0 (``low``) to 1 (``high``).

    ``model`` grades, over the OpenAI-compatible endpoint whose address, up to and without
    ``/chat/completions``, is ``service.url``. With ``reference`` it sees the problem's answer too.
    A completion of more than ``max_chars`` characters after its thinking scores the minimum.

    Raises:
        ValueError: an empty rubric, an empty range or no characters.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["judge"] = "judge"
    rubric: str
    model: GradingModel
    service: Service
    low: float = 0.0
    high: float = 10.0
    reference: bool = False
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        _check(self.kind, self.max_chars, self.rubric)
        if not self.low < self.high:
            raise ValueError(f"judge.low = {self.low}, high = {self.high}: low must be below high")

    def open(self) -> None:
        """Find a missing key or an unusable cache now. Raises ValueError or OSError."""
        _open(self.model, self.service)

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: all questions go out together."""
        task = _RUBRIC.format(low=self.low, high=self.high, rubric=self.rubric)
        rows = [
            no_gold(problem, "a text", len(completions))
            if self.reference and not gold_text(problem)
            else [
                _question(task, problem, completion, self.max_chars, reference=self.reference)
                for completion in completions
            ]
            for problem, completions in groups
        ]
        return _graded(rows, self.model, self.service, Grade(self.low, self.high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """1 if a grading model finds the answer to agree with the reference, 0 if not.

    For answers that no rule can compare. An answer that it finds to be none ("invalid") scores the
    part's minimum. ``model``, ``service`` and ``max_chars`` as in ``Judge``. The idea is that of
    CompassVerifier (arXiv 2508.03686); the wording is ours.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["verifier"] = "verifier"
    model: GradingModel
    service: Service
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        _check(self.kind, self.max_chars)

    def open(self) -> None:
        """Find a missing key or an unusable cache now. Raises ValueError or OSError."""
        _open(self.model, self.service)

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: all questions go out together."""
        rows = [
            [
                _question(_VERIFY, problem, completion, self.max_chars, reference=True)
                for completion in completions
            ]
            if gold_text(problem)
            else no_gold(problem, "a text", len(completions))
            for problem, completions in groups
        ]
        values = _graded(rows, self.model, self.service, _VERDICTS)
        invalid = refused("invalid", "the grading model finds no final result")
        return [[invalid if value == _INVALID else value for value in row] for row in values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairwise:
    """Share of comparisons within the group that a grading model lets the completion win.

    Every row is compared with the next ``opponents`` ones of its group (in a circle), each pair in
    both orders, so that a preference for a place cancels; a tie counts half. Equal answers tie
    without being asked about. The value says how good a row is *among its group*: it is no task
    metric (a group of one has no value), so give the reward another task. ``model``, ``service``
    and ``max_chars`` as in ``Judge``.

    Raises:
        ValueError: an empty rubric, no opponents or no characters.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["pairwise"] = "pairwise"
    rubric: str
    model: GradingModel
    service: Service
    opponents: int = 2
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        _check(self.kind, self.max_chars, self.rubric)
        if self.opponents < 1:
            raise ValueError(f"pairwise.opponents = {self.opponents}: must be at least 1")

    def open(self) -> None:
        """Find a missing key or an unusable cache now. Raises ValueError or OSError."""
        _open(self.model, self.service)

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups: all comparisons go out together."""
        texts = [[_answer(c, self.max_chars) for c in rows] for _, rows in groups]
        duels = [
            (g, first, second)
            for g, row in enumerate(texts)
            for a, b in pairs([i for i, text in enumerate(row) if isinstance(text, str)], self)
            for first, second in ((a, b), (b, a))
        ]
        task = _PAIR.format(rubric=self.rubric)
        open_duels = [duel for duel in duels if texts[duel[0]][duel[1]] != texts[duel[0]][duel[2]]]
        questions = [
            Question(
                task,
                (
                    ("REQUEST", _request(groups[g][0])),
                    ("FIRST ANSWER", str(texts[g][first])),
                    ("SECOND ANSWER", str(texts[g][second])),
                ),
            )
            for g, first, second in open_duels
        ]
        asked = ask(self.model, self.service, questions, _WINNERS)
        results = dict.fromkeys(duels, 0.5) | dict(zip(open_duels, asked, strict=True))
        return [
            [
                text if isinstance(text, Score) else self._value(results, g, i)
                for i, text in enumerate(row)
            ]
            for g, row in enumerate(texts)
        ]

    def _value(
        self, results: dict[tuple[int, int, int], float | Lost], group: int, row: int
    ) -> Value:
        """The mean of a row's results; unscored if none came back."""
        mine = [
            (result, first == row)
            for (g, first, second), result in results.items()
            if g == group and row in (first, second)
        ]
        won = [r if mine_first else 1 - r for r, mine_first in mine if not isinstance(r, Lost)]
        lost = [r for r, _ in mine if isinstance(r, Lost)]
        if won:
            return sum(won) / len(won)
        return ungraded(**explain(lost[0], self.service)) if lost else None


def pairs(rows: Sequence[int], settings: Pairwise) -> list[tuple[int, int]]:
    """Each row with its next ``settings.opponents`` ones in a circle, no pair twice."""
    size = len(rows)
    found = {
        tuple(sorted((rows[i], rows[(i + k) % size])))
        for i in range(size)
        for k in range(1, min(settings.opponents, size - 1) + 1)
    }
    return sorted((a, b) for a, b in found)


def _graded(
    rows: Sequence[Sequence[Question | Value]],
    model: GradingModel,
    service: Service,
    form: Grade | Choice,
) -> list[list[Value]]:
    """Put the questions among ``rows``, and their numbers (or failures) in their place."""
    questions = list(dict.fromkeys(q for row in rows for q in row if isinstance(q, Question)))
    answers = dict(zip(questions, ask(model, service, questions, form), strict=True))

    def value(entry: Question | Value) -> Value:
        if not isinstance(entry, Question):
            return entry
        answer = answers[entry]
        return ungraded(**explain(answer, service)) if isinstance(answer, Lost) else answer

    return [[value(entry) for entry in row] for row in rows]


def _question(
    task: str, problem: Problem, completion: Completion, max_chars: int, *, reference: bool
) -> Question | Value:
    answer = _answer(completion, max_chars)
    if isinstance(answer, Score):
        return answer
    gold = (("REFERENCE", gold_text(problem) or ""),) if reference else ()
    return Question(task, (("REQUEST", _request(problem)), *gold, ("ANSWER", answer)))


def _request(problem: Problem) -> str:
    return "\n\n".join(f"{message.role}: {message.content}" for message in problem.prompt)


def _answer(completion: Completion, max_chars: int) -> str | Score:
    """What follows the thinking, or why the completion scores the minimum."""
    text = after_thinking(completion.text).strip()
    if not text:
        return refused("no_answer", "nothing follows the thinking")
    if len(text) > max_chars:
        return refused("oversize", f"{len(text)} characters, more than max_chars = {max_chars}")
    return text


def _check(kind: str, max_chars: int, rubric: str = "-") -> None:
    if not rubric.strip():
        raise ValueError(f"{kind}.rubric is empty: say what a good answer is")
    if max_chars < 1:
        raise ValueError(f"{kind}.max_chars = {max_chars}: must be at least 1")


def _open(model: GradingModel, service: Service) -> None:
    service.key()
    remembered(model.keep).open()
