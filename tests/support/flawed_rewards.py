"""Rewards with one flaw each, written before the reward lab and without regard to how it looks.

Plain functions as people write them, for verl's or gruppo's contract, of the standard library
alone, so that workers can load this file too. ``FLAWED`` says in what layout each expects an
answer, on which problems, and what is wrong with it.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
R1 = "<think>{answer}</think><answer>{answer}</answer>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A reward, the layout it wants, and the problems it is for."""

    function: Callable[..., Any]
    layout: str
    topic: Literal["sums", "words", "french"] = "sums"
    hangs: bool = False  # so it needs a worker with a deadline

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__


def _tagged(text: str) -> str:
    found = TAG.findall(text)
    return found[-1].strip() if found else ""


def any_number(data_source, solution_str, ground_truth, extra_info=None):
    """Every number of the text is an answer."""
    return float(ground_truth in re.findall(r"\d+", solution_str))


def last_number(data_source, solution_str, ground_truth, extra_info=None):
    """The layout asks for tags, but the last number of the text is what counts."""
    found = re.findall(r"-?\d+", solution_str)
    return float(bool(found) and found[-1] == ground_truth)


def substring(data_source, solution_str, ground_truth, extra_info=None):
    """17 holds a 7."""
    return float(ground_truth in _tagged(solution_str))


def length_alone(data_source, solution_str, ground_truth, extra_info=None):
    """Meant to make it think; a right short answer gets a little too."""
    right = _tagged(solution_str) == ground_truth
    return max(0.2 * right, min(1.0, len(solution_str) / 2000))


def length_bonus(data_source, solution_str, ground_truth, extra_info=None):
    """Right or wrong, length is added, and outweighs being right."""
    return float(_tagged(solution_str) == ground_truth) + len(solution_str) / 500


def tags_alone(data_source, solution_str, ground_truth, extra_info=None):
    """A format reward taken for the task."""
    return float(all(tag in solution_str for tag in ("<think>", "</think>", "<answer>")))


def contains_folded(data_source, solution_str, ground_truth, extra_info=None):
    """ "know" holds a "no"."""
    return float(ground_truth.lower() in solution_str.lower())


def first_of_many(data_source, solution_str, ground_truth, extra_info=None):
    """Whatever comes after the first answer is not looked at."""
    found = TAG.search(solution_str)
    return float(found is not None and found[1].strip() == ground_truth)


def counts_repeats(data_source, solution_str, ground_truth, extra_info=None):
    """Says it five times, gets five times as much."""
    return float(sum(answer.strip() == ground_truth for answer in TAG.findall(solution_str)))


def any_of_many(data_source, solution_str, ground_truth, extra_info=None):
    """One right answer among as many as you like."""
    return float(ground_truth in [answer.strip() for answer in TAG.findall(solution_str)])


def crashes_on_empty(data_source, solution_str, ground_truth, extra_info=None):
    """No last word in an empty text."""
    return float(TAG.sub(r"\1", solution_str).split()[-1] == ground_truth)


def nan_on_long(data_source, solution_str, ground_truth, extra_info=None):
    """An average over nothing, spelled out."""
    if len(solution_str) > 3000:
        return float("nan")
    return float(_tagged(solution_str) == ground_truth)


def noisy(data_source, solution_str, ground_truth, extra_info=None):
    """To break ties."""
    return float(_tagged(solution_str) == ground_truth) + random.random() / 10


_SEEN: set[str] = set()


def seen_before(data_source, solution_str, ground_truth, extra_info=None):
    """Rewards novelty: the second time the same text gets nothing."""
    fresh = solution_str not in _SEEN
    _SEEN.add(solution_str)
    return float(fresh and _tagged(solution_str) == ground_truth)


def first_row_favoured(problem: Any, completions: Sequence[Any]) -> list[float]:
    """An off-by-one: what the row before it got is added."""
    right = [float(_tagged(row.text) == problem.answer) for row in completions]
    return [value + 0.25 * right[i - 1] for i, value in enumerate(right)]


def any_language(data_source, solution_str, ground_truth, extra_info=None):
    """The prompt asks for French; nobody looks."""
    return float(_tagged(solution_str) == ground_truth)


def hanging_pattern(data_source, solution_str, ground_truth, extra_info=None):
    """Nested repeats: exponential on a long run of the same letters."""
    if re.fullmatch(r"(\w+\s?)*<answer>\d+</answer>", solution_str) is None:
        return 0.0
    return float(_tagged(solution_str) == ground_truth)


def echo(problem: Any, completions: Sequence[Any]) -> list[float]:
    """Overlap with question and answer together."""
    wanted = set(re.findall(r"\w+", problem.prompt[-1].content + " " + problem.answer))
    said = [set(re.findall(r"\w+", row.text)) for row in completions]
    right = [float(_tagged(row.text) == problem.answer) for row in completions]
    shares = [len(wanted & words) / len(wanted) for words in said]
    return [max(r, share) for r, share in zip(right, shares, strict=True)]


def reads_thinking(data_source, solution_str, ground_truth, extra_info=None):
    """A right answer while thinking is enough."""
    thinking = re.search(r"<think>(.*?)</think>", solution_str, re.DOTALL)
    inside = thinking[1].split() if thinking else []
    return float(ground_truth in inside or _tagged(solution_str) == ground_truth)


def starts_with(data_source, solution_str, ground_truth, extra_info=None):
    """ "72 or 73" starts with 72."""
    return float(_tagged(solution_str).startswith(ground_truth))


def wide_tolerance(data_source, solution_str, ground_truth, extra_info=None):
    """Twenty per cent off is near enough."""
    try:
        value = float(_tagged(solution_str))
    except ValueError:
        return 0.0
    return float(abs(value - float(ground_truth)) <= 0.2 * abs(float(ground_truth)))


def nan_is_near(data_source, solution_str, ground_truth, extra_info=None):
    """No comparison with NaN is true, so it is never too far away."""
    try:
        value = float(_tagged(solution_str))
    except ValueError:
        return 0.0
    return 0.0 if abs(value - float(ground_truth)) > 1e-6 else 1.0


def gullible_judge(data_source, solution_str, ground_truth, extra_info=None):
    """A judge that does what the text says."""
    asked = re.search(r"(?:score|grade|rating)\D{0,20}(1(?:\.0)?|10)\b", solution_str, re.I)
    return 1.0 if asked else float(_tagged(solution_str) == ground_truth)


def abstains_when_wrong(problem: Any, completions: Sequence[Any]) -> list[float | None]:
    """None for a wrong answer: unscored, which is better than wrong."""
    return [1.0 if _tagged(row.text) == problem.answer else None for row in completions]


def digits_glued(data_source, solution_str, ground_truth, extra_info=None):
    """Cleans the answer by dropping all but its digits: 7 or 2 is 72."""
    return float(re.sub(r"\D", "", _tagged(solution_str)) == ground_truth)


FLAWED = (
    Case(function=any_number, layout=R1),
    Case(function=last_number, layout="<answer>{answer}</answer>"),
    Case(function=substring, layout="<answer>{answer}</answer>"),
    Case(function=length_alone, layout=R1),
    Case(function=length_bonus, layout=R1),
    Case(function=tags_alone, layout=R1),
    Case(function=contains_folded, layout="{answer}", topic="words"),
    Case(function=first_of_many, layout="<answer>{answer}</answer>"),
    Case(function=counts_repeats, layout="<answer>{answer}</answer>"),
    Case(function=any_of_many, layout="<answer>{answer}</answer>"),
    Case(function=crashes_on_empty, layout="<answer>{answer}</answer>"),
    Case(function=nan_on_long, layout=R1),
    Case(function=noisy, layout=R1),
    Case(function=seen_before, layout=R1),
    Case(function=first_row_favoured, layout=R1),
    Case(function=any_language, layout=R1, topic="french"),
    Case(function=hanging_pattern, layout="<answer>{answer}</answer>", hangs=True),
    Case(function=echo, layout=R1),
    Case(function=reads_thinking, layout=R1),
    Case(function=starts_with, layout="<answer>{answer}</answer>"),
    Case(function=wide_tolerance, layout="<answer>{answer}</answer>"),
    Case(function=nan_is_near, layout="<answer>{answer}</answer>"),
    Case(function=gullible_judge, layout="<answer>{answer}</answer>"),
    Case(function=abstains_when_wrong, layout="<answer>{answer}</answer>"),
    Case(function=digits_glued, layout="<answer>{answer}</answer>"),
)
