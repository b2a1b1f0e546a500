"""Before training: the data's own answers must get the full task reward.

A wrong column, or a reward that reads the answer elsewhere than the data give it, is found before
a model is trained on it. What wrong answers get is not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gruppo.data import check_answers
from gruppo.recipe.problems import Splits
from gruppo.recipe.reward import AUTO, OFF, RewardSection
from gruppo.reward import RewardSet
from gruppo.types import Completion, Problem, Score

# Real data hold some references that no reader understands. A tenth is far more than the few per
# cent of such sets, well above what chance does to a sample of 64, and half of what stops a run.
MAX_WRONG: Final = 0.1


def describe_check(section: RewardSection) -> str:
    """What will be tried before training, in one line."""
    template = section.own_answer()
    if template is not None:
        return (
            f"before training, a sample of each source's own answers is scored as {template!r}: "
            f"they must get the task reward {section.answer_score:g}"
        )
    if section.answer_template == OFF:
        return f'the data\'s own answers are not tried on the reward (answer_template = "{OFF}")'
    return _untried(section)


def refuse_wrong_grading(
    section: RewardSection, reward: RewardSet, splits: Splits, report: Callable[[str], None]
) -> None:
    """Score a sample of every source's own answers; tell those that fail, and refuse too many.

    The held-out split needs no look of its own: it is a part of the training sources.

    Raises:
        ValueError: of a source, more than ``MAX_WRONG`` do not get the full task reward.
    """
    template = section.own_answer()
    if template is None:
        if section.answer_template == AUTO:
            report(f"reward: {_untried(section)}")
        return

    def score(problem: Problem, text: str) -> Score:
        return reward.score(problem, [_completion(text)])[0]

    for name, problems in splits.named:
        result = check_answers(
            problems, score, answer_template=template, maximum=section.answer_score
        )
        if result.share_failed > MAX_WRONG:
            raise ValueError(
                f"{name}: {len(result.failed)} of {result.checked} of the data's own answers, "
                f"written as {template!r}, do not get the full task reward "
                f"{section.answer_score:g} (at most {MAX_WRONG:.0%} may fail). Mend the answer "
                "column, the task part of the reward, or reward.answer_template "
                f'("{OFF}" leaves this check out)\n{result.text()}'
            )
        if not result.ok:
            report(f"{name}: {result.text()}")


def _untried(section: RewardSection) -> str:
    """Why nothing is tried where the recipe leaves it to the task parts."""
    places = section.answer_places()
    silent = [name for name, template in places.items() if template is None]
    if silent:
        reason = f"{', '.join(silent)} cannot say where an answer is read"
    else:
        differing = ", ".join(f"{name} as {template!r}" for name, template in places.items())
        reason = f"its task parts read an answer in different places ({differing})"
    return (
        f"the data's own answers are not tried on the reward before training: {reason}; set "
        "reward.answer_template to try them"
    )


def _completion(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")
