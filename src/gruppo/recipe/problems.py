"""From the data section to problems: loaded, split, and cut to prompts that fit.

The held-out problems are taken from all sources together, so that equal prompts of two sources
stay on one side. Nothing is shuffled here; the stream does that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gruppo.data import Problems, View, check_answers, fitting, partition
from gruppo.recipe.data import DataSection, make_source
from gruppo.recipe.reward import RewardSection
from gruppo.reward import RewardSet
from gruppo.types import Completion, Message, Problem, Score

Encode = Callable[[Sequence[Message]], Sequence[int]]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Splits:
    """``train`` problems of each source with its weight, and ``held_out`` ones of all."""

    train: tuple[tuple[Problems, float], ...]
    held_out: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """Several data sets one after another, by position; nothing is copied."""

    parts: tuple[Problems, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Problems]) -> Joined:
        """Join ``parts`` in order."""
        return cls(tuple(parts), tuple(accumulate((len(part) for part in parts), initial=0)))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int, /) -> Problem:
        number, row = self.place(index)
        return self.parts[number][row]

    def __iter__(self) -> Iterator[Problem]:
        return (problem for part in self.parts for problem in part)

    def place(self, index: int) -> tuple[int, int]:
        """Number of the part that ``index`` falls into, and the position there."""
        number = next(n for n, start in enumerate(self.starts[1:]) if index < start)
        return number, index - self.starts[number]


def open_problems(section: DataSection, encode: Encode, report: Report) -> Splits:
    """Load all sources, hold problems out, and leave out prompts that are too long.

    Raises:
        ValueError: data that cannot be read as meant, or that leave nothing to train on.
        OSError: a file or a hub that cannot be reached.
    """
    sources = [make_source(table).load() for table in section.train]
    joined = Joined.of(sources)
    rows, held = partition(joined, section.held_out, seed=section.seed)
    shares = [array("Q") for _ in sources]
    for index in rows:
        number, row = joined.place(index)
        shares[number].append(row)
    train = [
        (_fit(View(source, share), section, encode, report), table.weight)
        for source, share, table in zip(sources, shares, section.train, strict=True)
    ]
    tests: list[Problems] = [View(joined, held)] if len(held) else []
    tests += [make_source(table).load() for table in section.test]
    fitted = [_fit(test, section, encode, report) for test in tests]
    return Splits(tuple(train), tuple(test[row] for test in fitted for row in range(len(test))))


def _fit(problems: Problems, section: DataSection, encode: Encode, report: Report) -> Problems:
    if not len(problems):
        raise ValueError("data: a source has no problem left to train on after the split")
    kept = fitting(problems, encode, section.max_prompt_tokens, policy=section.too_long)
    dropped = len(problems) - len(kept)
    if not dropped:
        return problems
    report(
        f"data: {dropped} of {len(problems)} problems left out, because their prompts have more "
        f"than {section.max_prompt_tokens} tokens"
    )
    return View(problems, kept)


def refuse_wrong_grading(
    section: RewardSection, reward: RewardSet, problems: Problems, report: Report
) -> None:
    """Score the data's own answers; tell failures, and refuse a reward that passes none.

    Raises:
        ValueError: none of the answers gets the full task reward.
    """
    if section.answer_template is None:
        return

    def score(problem: Problem, text: str) -> Score:
        return reward.score(problem, [_completion(text)])[0]

    result = check_answers(
        problems,
        score,
        answer_template=section.answer_template,
        maximum=section.answer_score,
    )
    if not result.ok:
        report(result.text())
    if result.checked and len(result.failed) == result.checked:
        raise ValueError(
            "reward: none of the data's own answers gets the full task reward "
            f"{section.answer_score}; mend the reward, data columns or reward.answer_template\n"
            + result.text()
        )


def _completion(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")
