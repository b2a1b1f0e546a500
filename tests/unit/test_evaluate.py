"""Evaluation: pass@1, pass@k and majority with hand-counted answers."""

import math

import pytest

from gruppo.evaluate import EVAL_KEY, EvalSettings, Evaluator, in_order
from gruppo.reward import Countdown, Exact, Format, Math, Number, Part, Regex, RewardSet
from gruppo.reward.vote import ballot
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


def evaluator(*, problems=PROBLEMS, reward=right, **settings):
    parts = (
        reward if isinstance(reward, RewardSet) else RewardSet((Part(name="right", reward=reward),))
    )
    return Evaluator(
        engine=Scripted(),
        encoder=Coder(),
        reward=parts,
        problems=problems,
        settings=EvalSettings(**{"samples": 0, **settings}),
        sampling=Sampling(max_tokens=9, temperature=1.0, top_k=7, min_p=0.3, stop=(".",)),
    )


class Answers(Scripted):
    """Says what the problem lists."""

    def __init__(self, *groups):
        super().__init__()
        self.groups = groups

    def generate(self, requests, sampling):
        return [tuple(map(said, group)) for group in self.groups]


def majority_of(reward, *groups, problems=None):
    """maj@n of problems whose completions are ``groups`` and whose answers are 0.5."""
    made = evaluator(
        problems=problems
        or tuple(
            Problem(id=str(n), prompt=(Message("user", "?"),), answer="0.5")
            for n in range(len(groups))
        ),
        reward=reward,
        greedy=False,
        samples=len(groups[0]),
        k=(1,),
    )
    object.__setattr__(made, "engine", Answers(*groups))
    return made().metrics.get(f"sampled/maj@{len(groups[0])}")


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
    keys = [request.key for request in requests]
    assert {key[:2] for key in keys} == {(EVAL_KEY, 0)}
    assert len(set(keys)) == 4


def test_the_draws_of_a_problem_do_not_depend_on_the_others():
    whole, part = evaluator(), evaluator(problems=PROBLEMS[2:])
    whole(), part()
    keys = [[request.key for request in made.engine.calls[0][0]] for made in (whole, part)]
    assert keys[1] == keys[0][2:]


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
    # the filters are the evaluation's own; stop strings are the rollout's
    assert sampling == Sampling(max_tokens=5, temperature=0.6, top_p=0.95, stop=(".",))
    assert {request.key[:2] for request in requests} == {(EVAL_KEY, 3)}


def test_filters_of_its_own_are_used_and_checked():
    made = evaluator(greedy=False, samples=1, k=(1,), top_k=20, min_p=0.1)
    made()
    ((_, sampling),) = made.engine.calls
    assert (sampling.top_k, sampling.min_p) == (20, 0.1)
    with pytest.raises(ValueError, match="min_p = 2"):
        EvalSettings(min_p=2.0)


def test_the_majority_counts_answers_and_leaves_out_none():
    made = evaluator(reward=Number(), samples=4, k=(1,))
    # 0 by 3 votes: right; 2 by 3 votes: wrong; nobody answers; 3 by 2 votes: right
    assert made().metrics["sampled/maj@4"] == 0.5


def test_equal_answers_vote_together():
    """Three spellings of the right number outvote two of the same wrong one."""
    assert majority_of(Number(), ["3", "3", ".5", "1/2", "0.50"]) == 1.0
    boxed = [rf"\boxed{{{text}}}" for text in ("3", "3", "0.5", r"\frac{1}{2}", r"$\dfrac12$")]
    assert majority_of(Math(), boxed) == 1.0
    share = [rf"\boxed{{{text}}}" for text in ("3", "3", r"50\%", "0.5", r"50 \%")]
    assert majority_of(Math(), share) == 1.0
    assert majority_of(Exact(), ["no", "no", "0.5", " 0.5", "0.5\n"]) == 1.0


def test_what_is_right_is_for_the_reward_to_say():
    """The text 1/2 is not the text 0.5."""
    assert majority_of(Exact(), ["1/2", "1/2", "0.5"]) == 0.0


def test_no_majority_without_answers():
    assert majority_of(right, ["0.5", "0.5"]) is None
    assert majority_of(Format(), ["0.5", "0.5"]) is None
    assert ballot(Regex(pattern="^a")) is None


def test_with_several_task_rewards_each_problem_votes_by_its_own():
    """A problem that only a function grades has no vote; the number's problem has."""
    problems = (
        Problem(id="a", prompt=(Message("user", "?"),), answer="2", info={"numbers": [1, 2]}),
        Problem(
            id="b",
            prompt=(Message("user", "?"),),
            info={"numbers": [1, 2], "target": 3},
            answer=None,
        ),
    )
    parts = RewardSet(
        (
            Part(
                name="right", reward=lambda p, rows: [None if p.answer is None else 1.0] * len(rows)
            ),
            Part(name="countdown", reward=Countdown(where="all")),
        ),
        task=("right", "countdown"),
    )
    # (1 + 2) twice, spelled in two ways, against 1 - 2 and 2 - 1
    groups = (["x"] * 4, ["1-2", "1 + 2", "1+2", "2 - 1"])
    assert majority_of(parts, *groups, problems=problems) == 1.0


@pytest.mark.parametrize(
    ("reward", "text", "vote"),
    [
        (Number(), "so 1,200.0 in all", "1200"),
        (Number(where="answer_tag"), "<answer>3 or 4</answer>", None),
        (Number(), "<think>4", None),
        (Math(), r"\boxed{\text{Friday}.}", "friday"),
        (Math(), r"\boxed{ 5 \text{ cm}}", "5"),
        (Math(), r"\boxed{x +1}", "x+1"),
        (Math(), r"\boxed{50\%}", "1/2"),
        (Math(), r"\boxed{50}", "50"),
        (Math(), r"\boxed{A}", "A"),
        (Math(), r"\boxed{(A)}", "A"),
        (Math(), r"\boxed{\text{A) both}}", "A"),
        (Math(), r"\boxed{\text{(A) 5 cm}}", "A"),
        (Math(), r"\boxed{A) or B)}", "A)orB)"),
        (Math(), r"\boxed{x}", "x"),
        (Math(), r"\boxed{(A)(B)}", "(A)(B)"),
        (Math(), "5", None),
        (Exact(), "<think>a</think> b  c\n", "b c"),
        (Exact(ignore_case=True, where="boxed"), r"\boxed{Ab}", "ab"),
        (Exact(), " ", None),
        (Countdown(), "<answer>(3 - 1)*12 = 24</answer>", "(3-1)*12=24"),
    ],
)
def test_votes(reward, text, vote):
    assert ballot(reward)(text) == vote


def test_a_number_of_problems_is_a_spread_that_growth_hardly_changes():
    def made(count, source):
        return [Problem(id=str(n), prompt=(), source=source) for n in range(count)]

    settings = EvalSettings(problems=20)
    few = tuple(made(100, "a") + made(100, "b"))
    chosen = settings.chosen(few)
    assert len(chosen) == 20
    assert [p for p in few if p in chosen] == list(chosen), "in their order"
    assert 5 <= sum(p.source == "a" for p in chosen) <= 15
    assert chosen != few[:20]
    grown = tuple(made(110, "a") + made(110, "b"))
    kept = set(map(name, chosen)) & set(map(name, settings.chosen(grown)))
    assert len(kept) >= 15, "a tenth more problems replace about a tenth"
    assert set(map(name, settings.chosen(few[::-1]))) == set(map(name, chosen))
    assert EvalSettings(problems=300).chosen(few) == EvalSettings().chosen(few) == few


def name(problem):
    return problem.source, problem.id


def test_metrics_of_each_source():
    problems = tuple(
        Problem(id=p.id, prompt=p.prompt, answer=p.answer, source="ab"[n > 1])
        for n, p in enumerate(PROBLEMS)
    )
    one = evaluator(samples=4, k=(4,), reward=Number())().metrics
    seen = evaluator(problems=problems, samples=4, k=(4,), reward=Number())().metrics
    # greedy: 0 and 1 right, then x wrong and 3 right; of four: 3, 1 and 0, 2
    assert {key: value for key, value in seen.items() if key not in one} == {
        "source/a/pass@1": 1.0,
        "source/a/pass@1_stderr": 0.0,
        "source/a/sampled/pass@4": 1.0,
        "source/a/sampled/avg@4": 0.5,
        "source/a/sampled/maj@4": 0.5,
        "source/b/pass@1": 0.5,
        "source/b/pass@1_stderr": math.sqrt(0.125),
        "source/b/sampled/pass@4": 0.5,
        "source/b/sampled/avg@4": 0.25,
        "source/b/sampled/maj@4": 0.5,
    }
    assert {key: seen[key] for key in one} == one


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
    assert len(evaluation.greedy) == 3
    assert evaluation.metrics["pass@1"] == 1.0


def test_an_unscored_completion_is_not_right():
    made = evaluator(problems=(PROBLEMS[1],), greedy=False, samples=4, k=(4,))
    assert made().metrics["sampled/avg@4"] == 0.25


def test_no_problems_is_an_error():
    with pytest.raises(ValueError, match=r"data\.held_out"):
        evaluator(problems=())()


def test_recorded_metrics_come_back_in_the_order_they_were_made():
    """As ``Evaluator`` makes them: greedy, drawn, then each source's; numbers count as numbers."""
    own = ["pass@1", "pass@1_stderr"]
    drawn = ["sampled/pass@1", "sampled/pass@8", "sampled/pass@16", "sampled/avg@16"]
    made = [*own, "len", "trunc_frac", "unscored_frac", "right_mean", "form_mean", *drawn]
    made += ["sampled/maj@16"]
    for source in ("a", "b/c"):
        made += [f"source/{source}/{name}" for name in (*own, *drawn)]
    metrics = {name: float(at) for at, name in enumerate(made)}
    assert sorted(made) != made
    again = in_order({name: metrics[name] for name in sorted(made)}, ["right", "form"])
    assert list(again.items()) == list(metrics.items())
