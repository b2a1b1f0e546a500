"""What a preflight's numbers mean for the recipe: warnings, each with the setting to change.

The limits are ours; that of unscored rows is a run's own, which stops it. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from gruppo.preflight.statistics import Interval
from gruppo.recipe import Recipe

Severity = Literal["error", "warning", "note"]

_GIB: Final = 2**30
_DEAD: Final = (0.5, 0.8)
_CUT: Final = (0.1, 0.3)
_UNSCORED: Final = 0.2  # train.MAX_UNSCORED: what stops a run
_WORTH: Final = 1.3  # times cheaper; less is within the error
_EPOCHS: Final = 10
_REPEATED: Final = 0.5
_FULL: Final = 0.9  # of the memory that is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A warning: what is wrong, and the setting to change."""

    severity: Severity
    rule: str
    text: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The numbers that rules read.

    ``likely`` is the memory of a run like what was drawn, ``peak`` that of one in which every group
    teaches and no completion ends early.
    """

    pass_rate: Interval | None
    dead: Interval | None
    worth: int | None
    seconds_per_live: Mapping[int, float]
    truncation: Interval
    longest: int
    unscored: float
    unique: float
    scoring_share: float
    run_seconds: float
    likely: int | None
    peak: int | None
    available: int | None
    problems: int
    draws: float
    total_varies: bool


def advise(recipe: Recipe, facts: Facts) -> list[Advice]:
    """All warnings, the worst first."""
    found = [advice for rule in RULES for advice in rule(recipe, facts)]
    return sorted(found, key=lambda a: ("error", "warning", "note").index(a.severity))


def _dead(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    if facts.dead is None or recipe.rollout.group_size < 2:
        return
    if facts.dead.value >= 1 - 1e-9 and facts.pass_rate is not None:
        always = facts.pass_rate.value > 0.5
        yield Advice(
            severity="error",
            rule="dead",
            text=f"every group is dead: all completions of a problem are "
            f"{'right' if always else 'wrong'} alike"
            + (", and only other parts of the reward differ" if facts.total_varies else ""),
            fix="take harder problems"
            if always
            else "take easier problems or a stronger model, "
            "or show the layout in the prompt (data.train.prompting); more of the same teaches "
            "nothing",
        )
        return
    if facts.dead.value > _DEAD[0]:
        easy = facts.pass_rate is not None and facts.pass_rate.value > 0.5
        yield Advice(
            severity="error" if facts.dead.value > _DEAD[1] else "warning",
            rule="dead",
            text=f"{facts.dead.text()} of the groups are dead",
            fix='rollout.filter = "resample", a larger rollout.group_size, or '
            f"{'harder' if easy else 'easier'} problems",
        )


def _size(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    own, worth = recipe.rollout.group_size, facts.worth
    if worth is None or worth == own or own not in facts.seconds_per_live:
        return
    times = facts.seconds_per_live[own] / facts.seconds_per_live[worth]
    if times > _WORTH:
        yield Advice(
            severity="warning" if own < worth else "note",
            rule="group_size",
            text=f"a live group costs {times:.1f} times as much with {own} completions as with "
            f"{worth}",
            fix=f"rollout.group_size = {worth}",
        )


def _truncation(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    most = recipe.rollout.max_tokens
    if facts.truncation.value > _CUT[0]:
        yield Advice(
            severity="error" if facts.truncation.value > _CUT[1] else "warning",
            rule="truncation",
            text=f"rollout.max_tokens = {most} cuts {facts.truncation.text()} of the completions",
            fix=f'rollout.max_tokens = {2 * most}, or rollout.truncation = "mask_after" with a '
            "soft_overlong part",
        )
    elif facts.longest * 4 <= most:
        yield Advice(
            severity="note",
            rule="max_tokens",
            text=f"the longest completion has {facts.longest} of {most} tokens; the plan keeps "
            "memory for all",
            fix=f"rollout.max_tokens = {max(16, 2 * facts.longest)}",
        )


def _reward(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    if facts.unscored > 0:
        yield Advice(
            severity="error" if facts.unscored > _UNSCORED else "warning",
            rule="unscored",
            text=f"{facts.unscored:.0%} of the completions could not be scored",
            fix="gruppo reward test tells which and why",
        )
    if facts.scoring_share > 0.3:
        yield Advice(
            severity="warning",
            rule="reward time",
            text=f"the reward takes {facts.scoring_share:.0%} of a step",
            fix="more workers for the reward function, or a cheaper one",
        )
    if facts.unique < _REPEATED:
        yield Advice(
            severity="warning",
            rule="repeated",
            text=f"only {facts.unique:.0%} of a group's completions differ",
            fix="rollout.temperature = 1.0 and no filters",
        )


def _schedule(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    warm, updates = recipe.optim.warmup_steps, recipe.train.num_updates
    if warm >= updates:
        yield Advice(
            severity="warning",
            rule="warm-up",
            text=f"the warm-up of {warm} updates is as long as the run of {updates} or longer",
            fix=f"optim.warmup_steps = {updates // 20}",
        )
    drawn = recipe.train.steps * recipe.rollout.prompts_per_step * facts.draws
    if facts.problems and drawn / facts.problems > _EPOCHS:
        yield Advice(
            severity="warning",
            rule="epochs",
            text=f"the run goes {drawn / facts.problems:.0f} times over {facts.problems} problems",
            fix="more data or fewer train.steps",
        )
    limit = recipe.train.time_limit_s
    if limit and facts.run_seconds > limit:
        yield Advice(
            severity="warning",
            rule="time",
            text=f"about {facts.run_seconds:.0f} s are needed, train.time_limit_s = {limit:g}",
            fix=f"train.steps = {max(1, int(recipe.train.steps * limit / facts.run_seconds))}",
        )


def _memory(recipe: Recipe, facts: Facts) -> Iterator[Advice]:
    if facts.peak is None or facts.available is None or facts.peak <= _FULL * facts.available:
        return
    likely = facts.peak if facts.likely is None else facts.likely
    yield Advice(
        severity="error" if likely > facts.available else "warning",
        rule="memory",
        text=f"about {likely / _GIB:.1f} GiB are needed, {facts.peak / _GIB:.1f} if every group "
        f"teaches and no completion ends early; {facts.available / _GIB:.1f} are there",
        fix="lower train.tokens_per_microbatch or engine.max_rows, or set "
        "model.gradient_checkpointing = true or [model.lora]",
    )


RULES: Final[tuple[Callable[[Recipe, Facts], Iterator[Advice]], ...]] = (
    _dead,
    _truncation,
    _reward,
    _memory,
    _size,
    _schedule,
)
