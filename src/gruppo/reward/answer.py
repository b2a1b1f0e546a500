r"""Answer rewards that need no mathematics: exact numbers and exact strings.

Each is 1 for a right answer and 0 for a wrong one. A completion without an answer, or with one
that cannot be read, is a failure of the completion (it scores the part's minimum); a problem
without a usable reference answer is a failure of the grader (its rows are unscored).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from gruppo.reward.base import Value, refused, ungraded
from gruppo.reward.extract import TEMPLATES, Where, after_thinking, find_answer, one_number
from gruppo.types import Completion, Problem


def gold_text(problem: Problem) -> str | None:
    """Return the reference answer; of a worked solution, what follows the last ``####``."""
    if problem.answer is None:
        return None
    return problem.answer.rpartition("####")[2].strip()


def no_gold(problem: Problem, needs: str, num_rows: int) -> list[Value]:
    """Return the rows of a problem whose reference answer is missing or unreadable: unscored."""
    kind = "gold_missing" if problem.answer is None else "gold_unreadable"
    text = f"problem {problem.id!r}: answer {problem.answer!r:.80} is not {needs}"
    return [ungraded(kind, text)] * num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    r"""1 if the completion's number equals the reference exactly, as fractions, else 0.

    ``where`` says which number counts: the ``last`` one of the text, or the one inside the
    ``answer_tag`` (``<answer>..</answer>``), the last ``boxed`` (``\boxed{..}``) or after
    ``hashes`` (``####``, as in GSM8K, arXiv 2110.14168). Only text after ``</think>`` is read.
    ``0.5``, ``1/2`` and ``.50`` are equal; ``0.33`` and ``1/3`` are not. A percent sign is ignored.

    Example:
        >>> from gruppo.types import Completion, Problem
        >>> row = Completion(tokens=(), logp=(), mask=(), version=(), finish="stop",
        ...                  text="<answer>1,200 dollars</answer>")
        >>> Number(where="answer_tag")(Problem(id="a", prompt=(), answer="1200"), [row])
        [1.0]
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["number"] = "number"
    where: Where = "last"

    def template(self) -> str:
        """A completion with ``{answer}`` where the number is read."""
        return TEMPLATES[self.where]

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade ``completions``."""
        gold = one_number(gold_text(problem) or "")
        if gold is None:
            return no_gold(problem, "a number", len(completions))
        return [self._grade(gold, completion.text) for completion in completions]

    def _grade(self, gold: object, text: str) -> Value:
        answer = find_answer(text, self.where)
        if answer.problem is not None:
            return refused(answer.problem, f"no {self.where} answer to read")
        number = one_number(answer.text)
        if number is None:
            return refused("unreadable", f"not one number: {answer.text!r:.80}")
        return float(number == gold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """1 if the answer equals the reference as text (white space collapsed), else 0.

    ``where = "all"`` compares everything after ``</think>``. ``ignore_case`` folds case.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["exact"] = "exact"
    where: Literal["all", "last", "answer_tag", "boxed", "hashes"] = "all"
    ignore_case: bool = False

    def template(self) -> str:
        """A completion with ``{answer}`` where the text is read."""
        return TEMPLATES[self.where]

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade ``completions``."""
        gold = gold_text(problem)
        if not gold:
            return no_gold(problem, "a text", len(completions))
        return [self._grade(self._normal(gold), completion.text) for completion in completions]

    def _grade(self, gold: str, text: str) -> Value:
        if self.where == "all":
            return float(self._normal(after_thinking(text)) == gold)
        answer = find_answer(text, self.where)
        if answer.problem is not None:
            return refused(answer.problem, f"no {self.where} answer to read")
        return float(self._normal(answer.text) == gold)

    def _normal(self, text: str) -> str:
        joined = " ".join(text.split())
        return joined.casefold() if self.ignore_case else joined
