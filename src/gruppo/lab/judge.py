"""What an examination means: findings, each with what scored how and what to change.

A share is an attack's task score against that of the right answer to the same problem: 1 is as
much, 0 is nothing (or the declared minimum, where that is below 0). The share of an attack is that
of its best variant, a mean over the problems: what a policy would gain that always plays it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from gruppo.lab.examine import Examination, Trial, Unequal
from gruppo.types import Score

Severity = Literal["error", "warning", "note"]

THRESHOLD: Final = 0.5
"""An attack that gets more than this share of the right answer's score is an exploit."""

_MORE: Final = 1.25  # the right answer said otherwise; a bonus for brevity may be a few per cent
_LENGTH: Final = 0.1  # of the right answer's score, for a wrong answer at length
_SLOW_S: Final = 1.0
_BOUND: Final = "bound the work by the text's length, or set the function's workers"
_MAX_WRONG: Final = 0.1  # golden pairs, as before training (recipe.answers)
_EQUAL: Final = 1e-6
_LANGUAGE: Final = re.compile(
    r"\b(?:answer|reply|respond|write|think|reason|explain|speak)\b[^.?!]{0,40}?\bin\s+("
    r"english|french|german|spanish|italian|portuguese|russian)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something found. ``rule`` names it for scripts; ``fix`` says what to change."""

    severity: Severity
    rule: str
    text: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An attack in the table: shares of its best variant, and that variant's name and text."""

    attack: str
    kind: str
    variant: str
    share: float
    total_share: float
    unscored: int
    text: str


Rule = Callable[[Examination, float], Iterator[Finding]]


def judge(seen: Examination, *, threshold: float = THRESHOLD) -> list[Finding]:
    """All findings, the worst first.

    Raises:
        ValueError: the threshold is no share.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold = {threshold}: must lie between 0 and 1, such as {THRESHOLD}")
    found = [finding for rule in RULES for finding in rule(seen, threshold)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def table(seen: Examination) -> list[Row]:
    """One row an attack, in the order of the attacks."""
    rows = []
    for name in dict.fromkeys(trial.attack for trial in seen.trials):
        tried = [trial for trial in seen.trials if trial.attack == name]
        best = max(tried, key=lambda trial: _or(share(seen, trial), -math.inf))
        rows.append(
            Row(
                attack=name,
                kind=best.kind,
                variant=best.variant,
                share=share(seen, best),
                total_share=max(
                    (_or(share_of_total(seen, trial), -math.inf) for trial in tried),
                    default=math.nan,
                ),
                unscored=sum(
                    score is not None and score.total is None
                    for trial in tried
                    for score in trial.scores
                ),
                text=best.text,
            )
        )
    return rows


def share(seen: Examination, trial: Trial) -> float:
    """Mean over problems of the trial's task score against the right answer's; NaN if unscored."""
    return _share(seen, trial, lambda score: score.task, min(0.0, seen.minimum))


def share_of_total(seen: Examination, trial: Trial) -> float:
    """The same of the total, weights and shaping terms included, against 0."""
    return _share(seen, trial, lambda score: score.total, 0.0)


def _share(
    seen: Examination, trial: Trial, value: Callable[[Score], float | None], floor: float
) -> float:
    shares = []
    for golden, score in zip(seen.golden, trial.scores, strict=True):
        full = value(golden)
        got = None if score is None else value(score)
        if full is not None and got is not None and full > floor + _EQUAL:
            shares.append((got - floor) / (full - floor))
    return fmean(shares) if shares else math.nan


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def _best(seen: Examination, trials: Sequence[Trial]) -> tuple[float, Trial] | None:
    known = [(value, t) for t in trials if not math.isnan(value := share(seen, t))]
    return max(known, key=lambda pair: pair[0]) if known else None


def _golden(seen: Examination, threshold: float) -> Iterator[Finding]:
    """The data's own answers must score the most there is."""
    asked = [(t, s) for t, s in zip(seen.targets, seen.alone, strict=True) if t.gold]
    if not asked:
        yield Finding(
            severity="note",
            rule="golden",
            text="the problems have no answers: only what needs none was tried",
            fix="give an answer column to try more",
        )
        return
    best = max((s.task for _, s in asked if s.task is not None), default=None)
    short = [t for t, s in asked if s.task is None or best is None or s.task < best - 1e-9]
    if best is not None and best <= min(0.0, seen.minimum) + _EQUAL:
        short = [t for t, _ in asked]
    if not short:
        return
    why = next((s.error for _, s in asked if s.error is not None), None)
    about = "" if why is None else f" ({why.kind}: {why.text:.160})"
    yield Finding(
        severity="error" if len(short) > _MAX_WRONG * len(asked) else "warning",
        rule="golden",
        text=f"{len(short)} of {len(asked)} right answers, written as "
        f"{seen.layout.template!r}, do not get the full task score, e.g. {short[0].gold!r}{about}",
        fix="mend the answer column or the reward, or say in reward.answer_template where the "
        "answer is read",
    )


def _exploits(seen: Examination, threshold: float) -> Iterator[Finding]:
    """Texts that know no answer, or give a wrong one, and are paid."""
    for name in dict.fromkeys(t.attack for t in seen.trials):
        tried = [t for t in seen.trials if t.attack == name]
        if tried[0].kind not in _FIXES:
            continue
        best = _best(seen, tried)
        if best is None or best[0] <= threshold:
            continue
        value, trial = best
        lenient = trial.variant == "instead of the layout" and not any(
            _or(share(seen, t), 0.0) > threshold for t in tried if t is not trial
        )
        yield Finding(
            severity="warning" if lenient else "error",
            rule=f"exploit/{name}",
            text=f"{trial.name} gets {value:.0%} of the right answer's score: {_shown(trial.text)}",
            fix=_FIXES[trial.kind],
        )


_FIXES: Final = {
    "blind": "grade one answer, in one place, by comparing all of it with the reference; nothing "
    "else of the text should count",
    "wrong": "compare by exact value or whole text: no prefixes, parts or wide tolerances",
    "misplaced": "read the answer only in its place, after the last </think> (our rewards: where = "
    '"answer_tag", "boxed" or "hashes")',
}


def _choices(seen: Examination, threshold: float) -> Iterator[Finding]:
    """Two values in one answer, or several answers: which one counts."""
    for kind in ("hedged", "several"):
        tried = {t.variant: share(seen, t) for t in seen.trials if t.kind == kind}
        paid = [variant for variant, value in tried.items() if _or(value, 0.0) > threshold]
        what = "one answer with two values" if kind == "hedged" else "one of several answers"
        if len(paid) == len(tried) and paid:
            severity: Severity = "error"
            text = f"{what} is right if any of them is: guessing pays"
        elif paid == ["right one first"]:
            severity = "warning"
            text = f"{what} is right if the first is, whatever follows"
        elif paid:
            severity = "warning" if kind == "hedged" and seen.layout.is_marked else "note"
            text = f"{what} is right if the last is"
        else:
            continue
        fix = "refuse a completion with more than one answer, or with an answer of several values"
        yield Finding(severity=severity, rule=f"choice/{kind}", text=text, fix=fix)


def _saying_more(seen: Examination, threshold: float) -> Iterator[Finding]:
    """The right answer, said otherwise, must not be worth much more; nor length by itself."""
    right = _best(seen, [t for t in seen.trials if t.kind == "right"])
    if right is not None and right[0] > _MORE:
        yield Finding(
            severity="error",
            rule="more",
            text=f"{right[1].name} gets {right[0]:.0%} of the plain right answer's score",
            fix="bound the reward: a right answer is worth the same however it is said",
        )
    wrong = _best(seen, [t for t in seen.trials if t.kind == "wrong" and "long" not in t.attack])
    long = _best(seen, [t for t in seen.trials if t.attack == "long wrong answer"])
    if wrong is not None and long is not None and long[0] - wrong[0] > _LENGTH:
        yield Finding(
            severity="error",
            rule="length",
            text=f"a wrong answer gets {long[0]:.0%} of the right one's score when it is long, "
            f"{wrong[0]:.0%} when it is short",
            fix="take the length out of the task reward; use a shaping term (soft_overlong, "
            "cosine_length) with reward.shape_only_live",
        )


def _totals(seen: Examination, threshold: float) -> Iterator[Finding]:
    """With all parts summed, nothing may pay as much as the right answer."""
    for trial in seen.trials:
        if trial.kind not in _FIXES or _or(share(seen, trial), 0.0) > threshold:
            continue
        value = share_of_total(seen, trial)
        if _or(value, 0.0) >= 1 - _EQUAL:
            yield Finding(
                severity="error",
                rule="total",
                text=f"{trial.name} gets {value:.0%} of the right answer's total, though the task "
                "part does not pay it",
                fix="lower the weights of the other parts until the task part decides",
            )
            return
    best = max(
        (_or(share_of_total(seen, t), 0.0) for t in seen.trials if t.kind == "wrong"), default=0.0
    )
    if threshold < best < 1 - _EQUAL and not any(_exploits(seen, threshold)):
        yield Finding(
            severity="note",
            rule="total",
            text=f"a wrong answer in perfect layout gets {best:.0%} of the right one's total",
            fix="fine while the task part still decides; lower the other weights if it stays there",
        )


def _failures(seen: Examination, threshold: float) -> Iterator[Finding]:
    """Exceptions, NaN, wrong types, deadlines; and None for what is wrong."""
    first: dict[str, tuple[Trial, Score]] = {}
    count: dict[str, int] = {}
    for trial in seen.trials:
        for score in trial.scores:
            if score is None or score.error is None or score.error.fault != "grader":
                continue
            kind = score.error.kind
            first.setdefault(kind, (trial, score))
            count[kind] = count.get(kind, 0) + 1
    for kind, (trial, score) in first.items():
        if kind == "none":
            yield Finding(
                severity="error",
                rule="unscored",
                text=f"None for {count[kind]} completions, e.g. {trial.name}: they are left "
                "unscored, which is better for the policy than a wrong answer",
                fix="return the lowest score for a completion without a right answer; None is for "
                "what the grader cannot know",
            )
            continue
        assert score.error is not None, "it has a kind"
        yield Finding(
            severity="error",
            rule=f"failure/{kind}",
            text=f"{count[kind]} completions fail with {kind}, e.g. {trial.name} "
            f"({_shown(trial.text, 40)}): {score.error.text:.200}",
            fix="catch it in the reward and return its lowest score",
        )


def _stability(seen: Examination, threshold: float) -> Iterator[Finding]:
    """The same completion must get the same score."""
    if seen.hung:
        stopped = "; the rest was not tried" if seen.gave_up else ""
        yield Finding(
            severity="error",
            rule="hangs",
            text=f"no score in time for {', '.join(seen.hung)}{stopped}",
            fix="bound the work by the text's length: patterns without nested repeats, a timeout "
            "of its own around parsers",
        )
    for how, (severity, words, fix) in _UNEQUAL.items():
        found = [u for u in seen.unequal if u.how == how]
        if found:
            yield Finding(
                severity=severity,
                rule=f"unequal/{how}",
                text=f"{len(found)} completions get another score {words}, e.g. "
                f"{_differs(found[0])}",
                fix=fix,
            )


_UNEQUAL: Final[dict[str, tuple[Severity, str, str]]] = {
    "again": (
        "error",
        "when they are scored again",
        "make it a function of its inputs: no chance, no clock, no memory between calls",
    ),
    "order": (
        "error",
        "when the group is turned round",
        "a completion's score must not depend on its place in the group",
    ),
    "company": (
        "note",
        "in a group than alone",
        "fine for a reward that compares the group's completions, a mistake in any other",
    ),
}


def _differs(unequal: Unequal) -> str:
    return f"{unequal.name}: {unequal.first} then {unequal.then}"


def _details(seen: Examination, threshold: float) -> Iterator[Finding]:
    """Slowness, languages, thinking without end, and completions that are paid for failing."""
    if seen.slowest[1] > _SLOW_S:
        bounded = seen.slowest[1] - seen.boxed_s <= _SLOW_S  # the rest, by the recipe's limits
        yield Finding(
            severity="note" if bounded else "warning",
            rule="slow",
            text=f"{seen.slowest[0]} takes {seen.slowest[1]:.1f} s",
            fix="lower sandbox.cpu_s if right programs need less" if bounded else _BOUND,
        )
    asked = next((m for t in seen.targets if (m := _LANGUAGE.search(t.prompt))), None)
    foreign = [t for t in seen.trials if t.attack == "right, other language"]
    best = _best(seen, foreign)
    if asked is not None and best is not None and best[0] > threshold:
        yield Finding(
            severity="warning",
            rule="language",
            text=f'the prompt says "{asked.group()}", but a right answer among Chinese sentences '
            f"gets {best[0]:.0%}",
            fix='add a part kind = "language" (by script), if the language matters',
        )
    open_ended = [t for t in seen.trials if t.variant == "thinking without end"]
    best = _best(seen, [t for t in open_ended if t.kind == "right"])
    if best is not None and best[0] > threshold:
        yield Finding(
            severity="note",
            rule="open thinking",
            text=f"an answer inside thinking that never ends gets {best[0]:.0%}",
            fix="read nothing if <think> is not closed",
        )


def _skipped(seen: Examination, threshold: float) -> Iterator[Finding]:
    """Parts that no made completion can be tried on."""
    if seen.skipped:
        yield Finding(
            severity="note",
            rule="skipped",
            text=f"not tried: {', '.join(seen.skipped)}, which read episodes with an environment",
            fix="draw completions of the model (--samples), which are episodes",
        )


def _shown(text: str, width: int = 70) -> str:
    return repr(text if len(text) <= width else text[:width] + "…")


RULES: Final[tuple[Rule, ...]] = (
    _golden,
    _exploits,
    _choices,
    _saying_more,
    _totals,
    _failures,
    _stability,
    _details,
    _skipped,
)
