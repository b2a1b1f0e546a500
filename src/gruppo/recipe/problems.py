"""From the data section to problems: loaded, split, and cut to prompts that fit.

The held-out problems are taken from all sources together, so that equal prompts of two sources
stay on one side. Nothing is shuffled here; the stream does that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal

from gruppo.data import Problems, View, fitting, partition
from gruppo.environment import Environment
from gruppo.recipe.data import AnySource, DataSection, make_source
from gruppo.recipe.recipe import Recipe
from gruppo.types import Message, Problem

Encode = Callable[[Sequence[Message]], Sequence[int]]
Report = Callable[[str], None]

USUAL_PROMPT: Final = 1024
"""Most tokens of a prompt where neither the recipe nor the model's context says less."""


@dataclass(frozen=True, slots=True)
class Splits:
    """``train`` problems of each source with its weight, and ``held_out`` ones of all.

    ``named`` are the sources, of training and evaluation, by their places in the recipe;
    ``dropped`` counts the training problems left out because their prompts are too long.
    """

    train: tuple[tuple[Problems, float], ...]
    held_out: tuple[Problem, ...]
    named: tuple[tuple[str, Problems], ...]
    dropped: int


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


@dataclass(frozen=True, slots=True)
class Posed:
    """Problems with the prompts that an environment gives them, made when asked for."""

    problems: Problems
    environment: Environment

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int, /) -> Problem:
        return self._posed(self.problems[index])

    def __iter__(self) -> Iterator[Problem]:
        return map(self._posed, self.problems)

    def _posed(self, problem: Problem) -> Problem:
        return replace(problem, prompt=self.environment.prompt(problem))


def prompt_limit(recipe: Recipe, context: int | None) -> int:
    """Most tokens a prompt may have, so that every completion has room in the model's context.

    Args:
        recipe: says ``data.max_prompt_tokens`` and the budgets of completions.
        context: most tokens the model can read, None if it states none.

    Raises:
        ValueError: prompt and completion do not fit together.
    """
    key, budget = max(
        ("rollout.max_tokens", recipe.rollout.max_tokens),
        ("eval.max_tokens", recipe.eval.max_tokens),
        key=lambda pair: pair[1],
    )
    given = recipe.data.max_prompt_tokens
    if context is None:
        return USUAL_PROMPT if given is None else given
    room = context - budget
    if given is None and room < 1:
        raise ValueError(
            f"{key} = {budget}: the context of {recipe.model.name} is {context} tokens, which "
            f"leaves no room for a prompt; set {key} well below it"
        )
    if given is not None and given > room:
        raise ValueError(
            f"data.max_prompt_tokens = {given} and {key} = {budget} are {given + budget} tokens "
            f"together, but the context of {recipe.model.name} is {context}: lower one of them "
            f"by {given - room}"
        )
    return min(room, USUAL_PROMPT) if given is None else given


def open_problems(
    section: DataSection,
    encode: Encode,
    report: Report,
    *,
    max_prompt_tokens: int,
    environment: Environment | None = None,
) -> Splits:
    """Load all sources, hold problems out, and leave out prompts that are too long.

    An ``environment`` makes the prompts.

    Raises:
        ValueError: data that cannot be read as meant, or that leave nothing to train on.
        OSError: a file or a hub that cannot be reached.
    """

    def load(table: AnySource) -> Problems:
        problems = make_source(table).load()
        return problems if environment is None else Posed(problems, environment)

    sources = [load(table) for table in section.train]
    joined = Joined.of(sources)
    rows, held = partition(joined, section.held_out, seed=section.seed)
    shares = [array("Q") for _ in sources]
    for index in rows:
        number, row = joined.place(index)
        shares[number].append(row)

    def fit(problems: Problems) -> Problems:
        kept = _fitting(problems, encode, max_prompt_tokens, policy=section.too_long)
        dropped = len(problems) - len(kept)
        if dropped:
            report(
                f"data: {dropped} of {len(problems)} problems left out, because their prompts have "
                f"more than {max_prompt_tokens} tokens"
            )
        return kept

    train = [
        (fit(View(source, share)), table.weight)
        for source, share, table in zip(sources, shares, section.train, strict=True)
    ]
    tests: list[Problems] = [View(joined, held)] if len(held) else []
    tests += [load(table) for table in section.test]
    fitted = [fit(test) for test in tests]
    own = fitted[len(fitted) - len(section.test) :]
    return Splits(
        train=tuple(train),
        held_out=tuple(test[row] for test in fitted for row in range(len(test))),
        named=(
            *((_name("train", n, part), part) for n, (part, _) in enumerate(train)),
            *((_name("test", n, part), part) for n, part in enumerate(own)),
        ),
        dropped=len(rows) - sum(len(part) for part, _ in train),
    )


def _name(key: str, number: int, problems: Problems) -> str:
    return f"data.{key}.{number} ({problems[0].source})"


def _fitting(
    problems: Problems, encode: Encode, limit: int, *, policy: Literal["drop", "error"]
) -> Problems:
    if not len(problems):
        raise ValueError("data: a source has no problem left to train on after the split")
    kept = fitting(problems, encode, limit, policy=policy)
    return problems if len(kept) == len(problems) else View(problems, kept)
