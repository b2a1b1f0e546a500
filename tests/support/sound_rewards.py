"""Rewards without a flaw, written before the reward lab: it must be silent about them.

Among them are kinds that look odd and are not: -1 for wrong, a little for the layout, a bonus
that depends on the group, a tolerance of rounding.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from support.flawed_rewards import R1, Case

_WHOLE = re.compile(r"-?\d{1,12}")
_LAYOUT = re.compile(r"\s*<think>(?:(?!<think>).)*</think>\s*<answer>([^<>]*)</answer>\s*", re.S)


def _only_answer(text: str) -> str | None:
    """The one answer after the thinking, or None."""
    after = text.rpartition("</think>")[2] if "<think>" in text else text
    found = re.findall(r"<answer>([^<>]{0,200})</answer>", after)
    return found[0].strip() if len(found) == 1 and text.count("<answer>") == 1 else None


def exact_tag(data_source, solution_str, ground_truth, extra_info=None):
    """One answer, after the thinking, the same text."""
    return float(_only_answer(solution_str) == ground_truth)


def plus_minus(data_source, solution_str, ground_truth, extra_info=None):
    """The form of DAPO: 1 for right, -1 for wrong."""
    return 1.0 if _only_answer(solution_str) == ground_truth else -1.0


def boxed_last(data_source, solution_str, ground_truth, extra_info=None):
    """The last box after the thinking counts, as is the custom."""
    after = solution_str.rpartition("</think>")[2] if "<think>" in solution_str else solution_str
    found = re.findall(r"\\boxed\{([^{}]{0,100})\}", after)
    return float(bool(found) and found[-1].strip() == ground_truth)


def hashes(data_source, solution_str, ground_truth, extra_info=None):
    """The custom of GSM8K: a whole number alone on the last line after ####."""
    last = solution_str.rstrip().rpartition("\n")[2]
    found = re.fullmatch(r"#### ?(-?[\d,]{1,15})", last)
    return float(found is not None and found[1].replace(",", "") == ground_truth)


def strict_word(data_source, solution_str, ground_truth, extra_info=None):
    """The one word inside the tags, capitals ignored."""
    return float((_only_answer(solution_str) or "").casefold() == ground_truth.casefold())


def layout_pays_little(data_source, solution_str, ground_truth, extra_info=None):
    """The form of TinyZero: 0.1 for the layout, 1 for the answer in it."""
    found = _LAYOUT.fullmatch(solution_str)
    if found is None:
        return 0.0
    return 1.0 if found[1].strip() == ground_truth else 0.1


def rounding_tolerated(data_source, solution_str, ground_truth, extra_info=None):
    """A number within a millionth of the right one, and a finite one."""
    answer = _only_answer(solution_str) or ""
    if not re.fullmatch(r"-?\d{1,12}(\.\d{1,12})?", answer):
        return 0.0
    gold = Fraction(ground_truth)
    return float(abs(Fraction(answer) - gold) <= abs(gold) / 1_000_000)


def short_among_right(problem: Any, completions: Sequence[Any]) -> list[float]:
    """Of the right ones of a group the shorter get up to a tenth more."""
    right = [_only_answer(row.text) == problem.answer for row in completions]
    longest = max([len(row.text) for row, r in zip(completions, right, strict=True) if r] or [1])
    return [
        1.0 + 0.1 * (1 - len(row.text) / longest) if r else 0.0
        for row, r in zip(completions, right, strict=True)
    ]


def integer_whole_text(data_source, solution_str, ground_truth, extra_info=None):
    """Nothing but the number may be said."""
    text = solution_str.strip()
    return float(_WHOLE.fullmatch(text) is not None and int(text) == int(ground_truth))


SOUND = (
    Case(function=exact_tag, layout=R1),
    Case(function=plus_minus, layout="<answer>{answer}</answer>"),
    Case(function=boxed_last, layout=r"\boxed{{answer}}"),
    Case(function=hashes, layout="#### {answer}"),
    Case(function=strict_word, layout="<answer>{answer}</answer>", topic="words"),
    Case(function=layout_pays_little, layout=R1),
    Case(function=rounding_tolerated, layout="<answer>{answer}</answer>"),
    Case(function=short_among_right, layout=R1),
    Case(function=integer_whole_text, layout="{answer}"),
)
