"""Evaluation: pass@1, pass@k and majority with hand-counted answers."""

import math

import pytest

from gruppo.evaluate import EVAL_KEY, EvalSettings, Evaluator
from gruppo.reward.base import Part, RewardSet
from gruppo.types import Completion, Message, Problem, Sampling

PROBLEMS = tuple(
    Problem(id=str(n), prompt=(Message("user", f"{n}?"),), answer=str(n)) for n in range(4)
)
ANSWERS = {0: "00x0", 1: "1222", 2: "xxxx", 3: "3xx3"}
"""What the n-th sample of each problem says; x is no answer."""


class Coder:
    stop_tokens = (0,)

    def encode(self, messages):
        return tuple(ord(c) for c in messages[0].content)


class Scripted:
    def __init__(self):
        self.calls = []

    def generate(self, requests, sampling):
        self.calls.append((requests, sampling))
        return [
            tuple(said(ANSWERS[request.tokens[0] - 48][n]) for n in range(request.num_samples))
            for request in requests
        ]

    def load(self, weights, version): ...

    def close(self): ...


def said(text):
    tokens = (1,) * (3 if text == "x" else 2)
    return Completion(
        tokens=tokens,
        logp=(-1.0,) * len(tokens),
        mask=(True,) * len(tokens),
        version=(0,) * len(tokens),
        text=text,
        finish="length" if text == "x" else "stop",
    )


def right(problem, completions):
    return [None if c.text == "2" else float(c.text == problem.answer) for c in completions]


def evaluator(*, problems=PROBLEMS, extract=None, **settings):
    return Evaluator(
        engine=Scripted(),
        encoder=Coder(),
        reward=RewardSet((Part(name="right", reward=right),)),
        problems=problems,
        settings=EvalSettings(**{"samples": 0, **settings}),
        sampling=Sampling(max_tokens=9, temperature=1.0),
        extract=extract,
    )


def test_greedy_metrics():
    made = evaluator()
    seen = made().metrics
    assert seen == pytest.approx(
        {
            "pass@1": 0.75,
            "pass@1_stderr": math.sqrt(0.75 * 0.25 / 4),
            "len": (2 + 2 + 3 + 2) / 4,
            "trunc_frac": 0.25,
            "unscored_frac": 0.0,
            "right_mean": 0.75,
        }
    )
    ((requests, sampling),) = made.engine.calls
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 9)
    assert [request.key for request in requests] == [(EVAL_KEY, 0, n) for n in range(4)]


def test_sampled_metrics():
    made = evaluator(greedy=False, samples=4, k=(1, 2, 4), max_tokens=5, seed=3)
    seen = made().metrics
    # right: 3, 1, 0 and 2 of 4; pass@2 = 1 - C(4 - c, 2) / C(4, 2)
    assert seen == pytest.approx(
        {
            "sampled/pass@1": 6 / 16,
            "sampled/pass@2": (1 + 3 / 6 + 0 + 5 / 6) / 4,
            "sampled/pass@4": 3 / 4,
            "sampled/avg@4": 6 / 16,
        }
    )
    ((requests, sampling),) = made.engine.calls
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.95, 5)
    assert {request.key[:2] for request in requests} == {(EVAL_KEY, 3)}


def test_the_majority_counts_answers_and_leaves_out_none():
    made = evaluator(samples=4, k=(1,), extract=lambda text: None if text == "x" else text)
    # 0 by 3 votes: right; 2 by 3 votes (unscored): wrong; nobody answers; 3 by 2 votes: right
    assert made().metrics["sampled/maj@4"] == 0.5


def test_only_some_problems_and_what_is_right():
    def half(problem, completions):
        return [0.5] * len(completions)

    made = evaluator(problems=PROBLEMS, correct_at=0.5)
    lenient = Evaluator(
        engine=made.engine,
        encoder=made.encoder,
        reward=RewardSet((Part(name="half", reward=half),)),
        problems=PROBLEMS,
        settings=EvalSettings(samples=0, problems=3, correct_at=0.5),
        sampling=made.sampling,
    )
    evaluation = lenient()
    assert [item.problem.id for item in evaluation.greedy] == ["0", "1", "2"]
    assert evaluation.metrics["pass@1"] == 1.0


def test_an_unscored_completion_is_not_right():
    made = evaluator(problems=(PROBLEMS[1],), greedy=False, samples=4, k=(4,))
    assert made().metrics["sampled/avg@4"] == 0.25


def test_no_problems_is_an_error():
    with pytest.raises(ValueError, match=r"data\.held_out"):
        evaluator(problems=())()
