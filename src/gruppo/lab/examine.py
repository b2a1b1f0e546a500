"""Scores golden pairs and attacks, alone, in one group, again and in another order.

It collects what was scored how; whether that is bad is said in ``judge.py``. A reward that hangs
is left alone after a few times. Rewards are called as training calls them, by ``RewardSet``.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from gruppo.lab.adapted import code_alone, with_deadline, without_episodes
from gruppo.lab.answers import others
from gruppo.lab.attacks import ATTACKS, Kind, Target
from gruppo.lab.layout import PLACE, USUAL, Layout
from gruppo.reward import RewardSet
from gruppo.reward.answer import gold_text
from gruppo.types import Completion, Problem, Score

_MAX_HANGS: Final = 3
_REPEATED: Final = 2  # problems whose groups are scored again
_MAX_PLAIN: Final = 2000  # characters of an attack's text that a report shows
_GOLDEN: Final = "golden"

_LATE: Final = frozenset(
    {"timeout", "died", "service_timeout", "service_deadline", "service_connection"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One variant of an attack: its score for every problem (None where it made no text)."""

    attack: str
    variant: str
    kind: Kind
    text: str
    scores: tuple[Score | None, ...]

    @property
    def name(self) -> str:
        """Attack and variant."""
        return f"{self.attack}: {self.variant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unequal:
    """A completion that got two scores: on the same input again, in another order or company."""

    how: Literal["again", "order", "company"]
    name: str
    first: float | None
    then: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was scored. ``golden`` are scored among the attacks, ``alone`` by themselves.

    ``skipped`` are the reward's parts that read an episode, which no made completion has.
    ``boxed_s`` is how much of ``slowest`` the parts take that run programs, in boxes whose limits
    are the recipe's own; 0 if there are none.
    """

    layout: Layout
    layout_is_known: bool
    targets: tuple[Target, ...]
    problems: tuple[Problem, ...]
    alone: tuple[Score, ...]
    golden: tuple[Score, ...]
    trials: tuple[Trial, ...]
    unequal: tuple[Unequal, ...]
    hung: tuple[str, ...]
    gave_up: bool
    minimum: float
    seconds_per_row: float
    slowest: tuple[str, float]
    skipped: tuple[str, ...]
    boxed_s: float


def examine(
    reward: RewardSet,
    problems: Sequence[Problem],
    *,
    template: str | None,
    max_tokens: int = 1 << 20,
) -> Examination:
    """Try ``reward`` on ``problems``.

    Args:
        reward: the whole reward, as trained on.
        problems: some of the data; those without an answer get the attacks that need none.
        template: a completion with ``{answer}`` where it is read; None tries the usual ones.
        max_tokens: budget of a completion; longer ones are marked as cut.

    Raises:
        ValueError: there are no problems, or all task parts read episodes.
    """
    if not problems:
        raise ValueError("data: no problems to try the reward on")
    reward, skipped = without_episodes(reward)
    scorer = _Scorer(with_deadline(reward), max_tokens)
    layout = Layout(template) if template is not None else find_layout(scorer.reward, problems)
    targets = make_targets(problems, layout)
    alone = [
        scorer.score(problem, [layout.own(target.gold)])[0]
        for problem, target in zip(problems, targets, strict=True)
    ]
    texts = [make_texts(problem, target) for problem, target in zip(problems, targets, strict=True)]
    singles, hung = _one_by_one(scorer, problems[0], texts[0])
    gave_up = len(hung) >= _MAX_HANGS
    for made in texts:
        for key in [k for k in made if k in hung or (gave_up and k not in singles)]:
            del made[key]
    grouped = [
        _together(scorer, problem, layout.own(target.gold), made)
        for problem, target, made in zip(problems, targets, texts, strict=True)
    ]
    unequal: list[Unequal] = []
    for number in range(min(_REPEATED, len(problems))):
        golden = layout.own(targets[number].gold)
        unequal += _again(scorer, problems[number], golden, grouped[number], texts[number])
    unequal += _in_company(singles, grouped[0])
    return Examination(
        layout=layout,
        layout_is_known=template is not None,
        targets=tuple(targets),
        problems=tuple(problems),
        alone=tuple(alone),
        golden=tuple(scores[_GOLDEN] for scores in grouped),
        trials=tuple(_trials(texts, grouped)),
        unequal=tuple(unequal),
        hung=tuple(hung),
        gave_up=gave_up,
        minimum=min(part.minimum for part in reward.parts if part.name in reward.task_names),
        seconds_per_row=scorer.mean_seconds,
        slowest=scorer.slowest,
        skipped=skipped,
        boxed_s=scorer.boxed_seconds(problems[0]),
    )


def find_layout(reward: RewardSet, problems: Sequence[Problem]) -> Layout:
    """The usual layout in which the data's answers score most (the first of equals)."""

    def mean(template: str) -> float:
        values = [
            reward.score(p, [make_completion(template.replace(PLACE, gold_text(p) or ""))])[0].task
            for p in problems[:4]
        ]
        return sum(value or 0.0 for value in values)

    return Layout(max(USUAL, key=mean))


def make_targets(problems: Sequence[Problem], layout: Layout) -> list[Target]:
    """What attacks need to know of each problem."""
    golds = [gold_text(problem) or "" for problem in problems]
    return [
        Target(
            prompt=problem.prompt[-1].content if problem.prompt else "",
            gold=gold,
            elsewhere=tuple(others(gold, [g for g in golds if g], problem.id)),
            layout=layout,
        )
        for problem, gold in zip(problems, golds, strict=True)
    ]


def make_texts(problem: Problem, target: Target) -> dict[str, str]:
    """All attacks on a problem: "attack: variant" to text."""
    return {
        f"{attack.name}: {variant}": text
        for attack in ATTACKS
        if target.gold or not attack.needs_answer
        for variant, text in attack.texts(target).items()
    }


@lru_cache(maxsize=256)  # the long ones are the same for every problem
def make_completion(text: str, max_tokens: int = 1 << 20) -> Completion:
    """A completion of ``text``; its tokens are made up, one for a word or sign."""
    words = re.findall(r"\w+|[^\w\s]|\s+", text)
    tokens = tuple(zlib.crc32(word.encode("utf-8", "surrogatepass")) % 50_000 for word in words)
    cut = tokens[:max_tokens]
    return Completion(
        tokens=cut,
        logp=(0.0,) * len(cut),
        mask=(True,) * len(cut),
        version=(0,) * len(cut),
        text=text,
        finish="length" if len(tokens) > max_tokens else "stop",
    )


class _Scorer:
    """Scores texts, and remembers how long the single ones took."""

    def __init__(self, reward: RewardSet, max_tokens: int) -> None:
        self.reward = reward
        self.seconds: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._max_tokens = max_tokens
        self._rows, self._spent = 0, 0.0

    def score(self, problem: Problem, texts: Sequence[str]) -> tuple[Score, ...]:
        rows = [make_completion(text, self._max_tokens) for text in texts]
        started = time.perf_counter()
        scores = self.reward.score(problem, rows)
        self._spent += time.perf_counter() - started
        self._rows += len(rows)
        return scores

    def timed(self, name: str, problem: Problem, text: str) -> Score:
        started = time.perf_counter()
        score = self.score(problem, [text])[0]
        self.seconds[name] = time.perf_counter() - started
        self._texts[name] = text
        return score

    def boxed_seconds(self, problem: Problem) -> float:
        """What the code parts alone take for the slowest text."""
        alone, name = code_alone(self.reward), self.slowest[0]
        if alone is None or name not in self._texts:
            return 0.0
        started = time.perf_counter()
        alone.score(problem, [make_completion(self._texts[name], self._max_tokens)])
        return time.perf_counter() - started

    @property
    def slowest(self) -> tuple[str, float]:
        return max(self.seconds.items(), key=lambda pair: pair[1], default=("", 0.0))

    @property
    def mean_seconds(self) -> float:
        return self._spent / self._rows if self._rows else 0.0


def is_late(score: Score) -> bool:
    """Whether the grader, not the completion, is to blame for no score in time."""
    error = score.error
    return error is not None and error.fault == "grader" and error.kind in _LATE


def _one_by_one(
    scorer: _Scorer, problem: Problem, texts: dict[str, str]
) -> tuple[dict[str, Score], list[str]]:
    """Every text by itself, and the names of those that hung."""
    found: dict[str, Score] = {}
    hung: list[str] = []
    for name, text in texts.items():
        found[name] = scorer.timed(name, problem, text)
        if is_late(found[name]):
            hung.append(name)
        if len(hung) >= _MAX_HANGS:
            break
    return found, hung


def _together(
    scorer: _Scorer, problem: Problem, golden: str, texts: dict[str, str]
) -> dict[str, Score]:
    """All texts in one group, the golden one first; one by one if that fails as a whole."""
    rows = {_GOLDEN: golden, **texts}
    scores = dict(zip(rows, scorer.score(problem, list(rows.values())), strict=True))
    failed = [s for s in scores.values() if s.error is not None and s.error.fault == "grader"]
    if len(failed) < len(rows):
        return scores
    return {name: scorer.score(problem, [text])[0] for name, text in rows.items()}


def _again(
    scorer: _Scorer, problem: Problem, golden: str, before: dict[str, Score], texts: dict[str, str]
) -> list[Unequal]:
    """The same group again, then turned round; the order is blamed only if the first is equal."""
    rows = {_GOLDEN: golden, **texts}
    if all(score.total is None for score in before.values()):  # fails as a whole: said elsewhere
        return []
    again = dict(zip(rows, scorer.score(problem, list(rows.values())), strict=True))
    unequal = _differing("again", before, again)
    if unequal:
        return unequal
    back = scorer.score(problem, list(reversed(rows.values())))
    return _differing("order", before, dict(zip(reversed(rows), back, strict=True)))


def _in_company(singles: dict[str, Score], grouped: dict[str, Score]) -> list[Unequal]:
    shared = {name: score for name, score in grouped.items() if name in singles}
    return _differing("company", {name: singles[name] for name in shared}, shared)


def _differing(
    how: Literal["again", "order", "company"], first: dict[str, Score], then: dict[str, Score]
) -> list[Unequal]:
    # what was not scored in time is no other score; it is told by itself
    return [
        Unequal(how=how, name=name, first=score.task, then=then[name].task)
        for name, score in first.items()
        if score.task != then[name].task and not (is_late(score) or is_late(then[name]))
    ]


def _trials(texts: Sequence[dict[str, str]], grouped: Sequence[dict[str, Score]]) -> list[Trial]:
    names = list(dict.fromkeys(name for made in texts for name in made))
    kinds = {attack.name: attack.kind for attack in ATTACKS}
    trials = []
    for name in names:
        attack, _, variant = name.partition(": ")
        text = next(made[name] for made in texts if name in made)
        trials.append(
            Trial(
                attack=attack,
                variant=variant,
                kind=kinds[attack],
                text=text[:_MAX_PLAIN],
                scores=tuple(scores.get(name) for scores in grouped),
            )
        )
    return trials
