"""Rewards that fail, hang, die, lie or talk too much cost their own rows only."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gruppo.reward import Function, Math, Part, Regex, RewardSet
from gruppo.types import Completion, Problem, Score
from gruppo.worker.process import Death
from support.scores import count_failures

# What one completion's text makes the function do; every other text scores its length.
BEHAVIOUR = """
import json, os, sys, time

def act(text):
    if text == "raise": raise RuntimeError("boom")
    if text == "hang": time.sleep(3600)
    if text == "nan": return float("nan")
    if text == "inf": return float("inf")
    if text == "none": return None
    if text == "string": return "1.0"
    if text == "bool": return True
    if text == "huge": return 1e308
    if text == "digits": return 10 ** 5000
    if text == "sys.exit": sys.exit(0)
    if text == "os._exit": os._exit(0)
    if text == "kill": os.kill(os.getpid(), 9)
    if text == "fork": os.fork()
    if text == "close": os.closerange(0, 64); time.sleep(0.2); os._exit(0)
    if text == "print":
        for _ in range(64): sys.stdout.write("x" * 1048576)
        print('{"id": "00", "reply": [9.0]}', file=sys.stderr)
    if text == "spoof":
        for descriptor in range(3, 64):
            try: os.write(descriptor, b'{"id": "' + b"0" * 32 + b'", "reply": [9.0]}\\n')
            except OSError: pass
    if text == "object": return object()
    if text == "deep":
        value = []
        for _ in range(100000): value = [value]
        return value
    return float(len(text))

def trl(prompts, completions, **kwargs):
    values = [act(c[0]["content"]) for c in completions]
    return values[:-1] if any(c[0]["content"] == "short" for c in completions) else values

def group(problem, completions):
    from gruppo.types import Score
    first, *rest = [act(c.text) for c in completions]
    return [Score(total=first, task=0.5, steps=((1, 0.25),)), *rest]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return act(solution_str)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "behaviour.py"
    path.write_text(BEHAVIOUR)
    return str(path)


@pytest.fixture(scope="module")
def trl(file: str) -> Iterator[Function]:
    reward = Function(name=f"{file}:trl", contract="trl", timeout_s=1.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def verl(file: str) -> Iterator[Function]:
    reward = Function(name=file, contract="verl", timeout_s=1.0)
    yield reward
    reward.close()


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def grade(reward, *groups: tuple[str, ...]) -> list[tuple[Score, ...]]:
    rows = [
        (Problem(id=str(i), prompt=(), answer="1"), [row(t) for t in texts])
        for i, texts in enumerate(groups)
    ]
    return RewardSet((Part(name="r", reward=reward),)).score_groups(rows)


KINDS = {
    "raise": "exception",
    "nan": "nonfinite",
    "inf": "nonfinite",
    "none": "none",
    "string": "type",
    "bool": "type",
    "huge": "magnitude",
    "sys.exit": "exit",
    "os._exit": "died",
    "kill": "died",
    "hang": "timeout",
    "short": "length",
    "object": "type",
    "deep": "recursion",
    "digits": "exception",
    "close": "died",
}


@pytest.mark.parametrize("text", KINDS)
def test_a_bad_row_costs_only_itself(trl: Function, text: str) -> None:
    first, second = grade(trl, ("a", text, "ccc"), ("dd", "e"))
    assert [s.total for s in first] == [1.0, None, 3.0]
    assert [s.total for s in second] == [2.0, 1.0]
    assert count_failures([*first, *second]) == {f"grader/{KINDS[text]}": 1}


@pytest.mark.parametrize("text", ["fork", "print", "spoof"])
def test_forks_prints_and_forged_replies_change_nothing(trl: Function, text: str) -> None:
    first, second = grade(trl, ("a", text, "ccc"), ("dd", "e"))
    assert [s.total for s in first] == [1.0, float(len(text)), 3.0]
    assert [s.total for s in second] == [2.0, 1.0]
    assert [s.total for s in grade(trl, ("aaaa",))[0]] == [4.0]


def test_verl_rows_are_called_one_by_one(verl: Function) -> None:
    [scores] = grade(verl, ("a", "raise", "os._exit", "ccc", "bool", "nan"))
    assert [s.total for s in scores] == [1.0, None, None, 3.0, 1.0, None]
    assert count_failures(scores) == {
        "grader/exception": 1,
        "grader/died": 1,
        "grader/nonfinite": 1,
    }


def test_a_function_of_whole_groups_fails_by_the_group(file: str) -> None:
    reward = Function(name=f"{file}:group", timeout_s=1.0)
    try:
        first, second = grade(reward, ("a", "raise"), ("dd", "e"))
    finally:
        reward.close()
    assert [s.total for s in first] == [None, None]
    assert [s.total for s in second] == [2.0, 1.0]
    assert [s.task for s in second] == [0.5, 1.0]
    assert second[0].steps == ((1, 0.25),)
    assert first[0].error is not None
    assert "RuntimeError: boom at " in first[0].error.text


def test_a_reward_that_always_hangs_is_given_up(file: str) -> None:
    reward = Function(name=file, contract="verl", timeout_s=0.1)
    started = time.monotonic()
    try:
        [scores] = grade(reward, ("hang",) * 40)
    finally:
        reward.close()
    assert [s.total for s in scores] == [None] * 40
    assert count_failures(scores) == {"grader/timeout": 40}
    assert time.monotonic() - started < 10


def test_a_worker_that_cannot_start_unscores_everything() -> None:
    reward = Function(name="no_such_module_at_all:f", contract="trl")
    [scores] = grade(reward, ("a", "b"))
    assert count_failures(scores) == {"grader/start": 2}
    assert scores[0].error is not None
    assert "No module named" in scores[0].error.text


def test_close_leaves_no_process_and_the_reward_works_again(file: str) -> None:
    reward = Function(name=file, contract="verl", timeout_s=5.0, workers=2)
    for _ in range(2):
        [scores] = grade(reward, ("a", "bb", "ccc", "dddd"))
        assert [s.total for s in scores] == [1.0, 2.0, 3.0, 4.0]
        pids = reward._pool().pids()
        assert 1 <= len(pids) <= 2
        reward.close()
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists()


def test_a_pattern_that_backtracks_for_ever_costs_its_own_rows_only() -> None:
    reward = Regex(pattern=r"(a+)+b")
    hostile, started = "a" * 40, time.monotonic()  # 2**40 ways to cut it
    try:
        first, second = grade(reward, ("aab", hostile, "ccc"), ("b", "ab"))
    finally:
        reward.close()
    # the policy wrote the text that hangs: it must not be better off than with a wrong one
    assert [s.total for s in first] == [1.0, 0.0, 0.0]
    assert [s.total for s in second] == [0.0, 1.0]
    assert count_failures([*first, *second]) == {"completion/timeout": 1}
    assert first[1].error is not None
    assert first[1].error.text.startswith("pattern '(a+)+b': no result after 1 s")
    assert time.monotonic() - started < 12


def test_a_pattern_that_hangs_on_all_texts_unscores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.reward.regex._CPU_S", 0.1)
    monkeypatch.setattr("gruppo.reward.regex._MAX_DEATHS", 2)
    reward, hostile = Regex(pattern=r"(a+)+b"), "a" * 40
    part = Part(name="fun", reward=reward, minimum=-1.0)
    try:
        alone = RewardSet((part,)).score(Problem(id="p", prompt=()), [row(hostile)] * 4)
        mixed = RewardSet((part,)).score(
            Problem(id="p", prompt=()), [row(text) for text in ("ab", hostile, hostile, "ab", "c")]
        )
    finally:
        reward.close()
    assert [s.total for s in alone] == [None] * 4
    assert count_failures(alone) == {"grader/timeout": 4}
    # two deaths, then nothing more is tried
    assert [s.total for s in mixed] == [1.0, -1.0, -1.0, -1.0, -1.0]
    assert count_failures(mixed) == {"completion/timeout": 4}
    assert "not tried after several failures" in mixed[4].error.text


# -- math -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math() -> Iterator[Math]:
    reward = Math(cpu_s=0.5, workers=1)
    yield reward
    reward.close()


def verdicts(reward: Math, gold: str, *answers: str) -> list[float | str]:
    rows = [row(f"\\boxed{{{a}}}") for a in answers]
    values = reward(Problem(id="p", prompt=(), answer=gold), rows)
    return [
        f"{v.error.fault}/{v.error.kind}" if isinstance(v, Score) and v.error else v for v in values
    ]


@pytest.mark.parametrize(
    ("gold", "wrong", "right"),
    [
        ("1e-7", "2e-7", "0.0000001"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "2^{-99}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", r"1/2004!"),
        (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}", "1-e^{-1}"),
        ("2=2", "3=3", "2=2"),
        (r"50\%", "0.05", "0.5"),
        ("1e6", "1", "10^6"),
        ("12:30", "12:45", "12:30"),
        ("A", "(B) because", "(A)"),
        ("72", "I do not know", "72.0"),
        (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}", r"x \cdot 2^{-99}"),
        (r"\frac{1}{10^9}", r"\frac{1}{10^7}", "10^{-9}"),
        ("(1,2)", "[1,2]", "(1, 2)"),
        ("x^2-1", "x^2+1", "(x-1)(x+1)"),
    ],
)
def test_pairs_that_math_verify_alone_gets_wrong(
    math: Math, gold: str, wrong: str, right: str
) -> None:
    assert verdicts(math, gold, right)[0] == 1.0
    assert verdicts(math, gold, wrong)[0] in (0.0, "completion/unreadable")


def test_lists_with_an_ellipsis_are_not_guessed(math: Math) -> None:
    gold = r"1,2,\ldots,10"
    assert verdicts(math, gold, r"1,2,\ldots,10", r"1,2,\ldots,20") == [
        1.0,
        "grader/gold_ellipsis",
    ]
    assert verdicts(math, "1,2,3", r"1,\ldots,3") == ["completion/ellipsis"]


def test_a_reference_that_the_grammar_does_not_know_is_the_graders_failure(math: Math) -> None:
    assert verdicts(math, r"\foo(((", "x^2") == ["grader/gold_unreadable"]


def test_a_checker_killed_from_outside_is_replaced_and_knows_no_secret(
    math: Math, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdicts(math, r"\sqrt{4}", "2") == [1.0]
    monkeypatch.setenv("SECRET_TOKEN", "planted-secret")
    [pid] = math._pool().pids()
    os.killpg(pid, signal.SIGKILL)
    assert verdicts(math, r"\sqrt{9}", "3", r"\sqrt{16}") == [1.0, 0.0]
    [other] = math._pool().pids()
    assert other != pid
    assert b"planted-secret" not in Path(f"/proc/{other}/environ").read_bytes()


SEES = """
import os

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(os.environ.get(solution_str, "") == "planted-secret")
"""


def test_a_function_sees_only_the_secrets_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sees.py").write_text(SEES)
    names = ("JUDGE_API_KEY", "HF_TOKEN", "PLAIN_SETTING")
    for name in names:
        monkeypatch.setenv(name, "planted-secret")
    for secrets, expected in (((), [0.0, 0.0, 1.0]), (("JUDGE_API_KEY",), [1.0, 0.0, 1.0])):
        reward = Function(name=str(tmp_path / "sees.py"), secrets=secrets)
        try:
            assert reward.open() == "verl"
            (found,) = grade(reward, names)
            [pid] = reward._pool().pids()
            inside = Path(f"/proc/{pid}/environ").read_bytes()
        finally:
            reward.close()
        assert [score.total for score in found] == expected
        assert inside.count(b"planted-secret") == 1 + len(secrets)
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(ValueError, match=r"JUDGE_API_KEY is not set; export it"):
        reward.open()


def test_a_checker_that_keeps_dying_leaves_the_row_unscored(
    math: Math, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = math._pool()
    monkeypatch.setattr(pool, "map", lambda payloads, seconds: [Death("died", -9)] * len(payloads))
    assert verdicts(math, r"\sqrt{4}", "2") == ["grader/checker_died"]
    monkeypatch.setattr(pool, "map", lambda payloads, seconds: [Death("died", -11)] * len(payloads))
    assert verdicts(math, r"\sqrt{4}", "2") == ["completion/crash"]
    monkeypatch.setattr(pool, "map", lambda payloads, seconds: [Death("start", None, "no sympy")])
    assert verdicts(math, r"\sqrt{4}", "2") == ["grader/checker_start"]


HOSTILE = (
    "9^{9^{9}}", "9^{9^{9^{9}}}", "(10^{9})!", "10000000!", "((100!)!)!",
    r"\binom{10^9}{5\cdot 10^8}", r"\sum_{n=1}^{10^9} n^n", r"\prod_{n=1}^{10^8} n",
    r"\int_0^1 \sin(x^x)\cos(e^{x^2}) dx", "(x+y+z+1)^{300}", "(x+1)^{10000}",
    "{" * 900 + "}" * 900, "(" * 900 + "1" + ")" * 900, r"\frac{1}{" * 150 + "1" + "}" * 150,
    r"\sqrt{" * 250 + "2" + "}" * 250, "x^{" * 300 + "x" + "}" * 300, "1" * 1999,
    "9" * 600 + "^{" + "9" * 600 + "}", "\x00\x00", "\u202e12", "\ufffd\ufffd", "1/0",
    "__import__('os').system('touch gruppo_was_here')", r"\text{" + "a" * 1900 + "}",
    r"\sin(" * 200 + "x" + ")" * 200, r"\lim_{x\to 0} \frac{\sin(\sin(\sin(x)))}{x^{100}}",
    r"\frac{0}{0}", r"\infty-\infty", "2^{2^{2^{2^{2^{2^{2}}}}}}", "1," * 900, "1e999999999",
    r"\sqrt[10^9]{2}+\cos(10^{10^{10}})", r"\log_{10^{-10^9}}(7)", "", "0" * 3000,
)  # fmt: skip


def test_a_few_hostile_answers_score_the_minimum_and_the_others_are_exact(math: Math) -> None:
    answers = ("9^{9^{9}}", r"2\sqrt{2}", *HOSTILE[11:19], r"\sqrt{8}", "2^{3/2}", "3")
    rows = [row(f"\\boxed{{{a}}}") for a in answers]
    part = Part(name="math", reward=math, minimum=-0.5)
    problem = Problem(id="p", prompt=(), answer=r"\sqrt{8}")
    scores = RewardSet((part,)).score(problem, rows)
    assert scores[0].total == -0.5
    assert scores[0].error is not None
    assert (scores[0].error.fault, scores[0].error.kind) == ("completion", "timeout")
    assert [s.total for s in scores[1:2]] == [1.0]
    assert all(s.total in (-0.5, 0.0) for s in scores[2:10])
    assert [s.total for s in scores[10:]] == [1.0, 1.0, 0.0]


@pytest.mark.slow
def test_35_hostile_answers_in_a_batch_of_256() -> None:
    assert len(HOSTILE) == 35
    reward = Math()
    honest = [(rf"\frac{{{n}}}{{7}}+x", rf"x+\frac{{{2 * n}}}{{14}}") for n in range(221)]
    groups = [
        (Problem(id="h", prompt=(), answer=r"\frac{x}{2}+1"), [row(rf"\boxed{{{h}}}")])
        for h in HOSTILE
    ]
    groups += [
        (Problem(id=str(n), prompt=(), answer=g), [row(rf"\boxed{{{a if n % 2 else 'x+1000'}}}")])
        for n, (g, a) in enumerate(honest)
    ]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        scores = RewardSet((Part(name="math", reward=reward),)).score_groups(groups)
    finally:
        reward.close()
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert [s[0].total for s in scores[:35]] == [0.0] * 35
    expected = [float(n % 2 == 1) for n in range(221)]
    assert [s[0].total for s in scores[35:]] == expected
    assert not Path("gruppo_was_here").exists()
    # The limits are CPU time: on a busy machine, what two idle cores would have taken counts.
    assert min(seconds, cpu / 2) < 20
