"""The reward lab against rewards that were written before it: what it finds, where it is silent."""

import math
import time
from dataclasses import replace

import pytest

from gruppo.lab import Layout, correlate, examine, judge, judge_lengths, made_lengths, share, table
from gruppo.lab.adapted import with_deadline
from gruppo.lab.answers import among, others, same, wrong_answers
from gruppo.reward import (
    Code,
    EnvironmentReward,
    Function,
    Gate,
    GradingModel,
    InProcess,
    Judge,
    Part,
    Remote,
    RewardSet,
    Service,
    ToolUse,
    Verifiers,
)
from gruppo.types import Message, Problem
from support.flawed_rewards import FLAWED, R1, Case
from support.http_server import answering, chat
from support.sound_rewards import SOUND

SUMS = ((17, 25), (6, 8), (31, 40), (5, 2))
PRIMES = (2, 4, 7, 9)


def problem(number: int, question: str, answer: str) -> Problem:
    return Problem(id=str(number), prompt=(Message("user", question),), answer=answer)


PROBLEMS = {
    "sums": [problem(n, f"What is {a} + {b}?", str(a + b)) for n, (a, b) in enumerate(SUMS)],
    "words": [
        problem(n, f"Is {number} a prime?", "yes" if number in (2, 7) else "no")
        for n, number in enumerate(PRIMES)
    ],
    "french": [
        problem(n, f"What colour is {noun}? Think in French.", colour)
        for n, (noun, colour) in enumerate(
            (("snow", "blanc"), ("coal", "noir"), ("blood", "rouge"))
        )
    ],
}

# What gives each flaw away; every other finding of the same reward follows from it.
RULES = {
    "any_number": "exploit/all numbers",
    "last_number": "exploit/right elsewhere",
    "substring": "exploit/wrong answer",
    "length_alone": "length",
    "length_bonus": "length",
    "tags_alone": "exploit/only tags",
    "contains_folded": "exploit/all candidates",
    "first_of_many": "choice/several",
    "counts_repeats": "more",
    "any_of_many": "exploit/all candidates",
    "crashes_on_empty": "failure/exception",
    "nan_on_long": "failure/nonfinite",
    "noisy": "unequal/again",
    "seen_before": "unequal/again",
    "first_row_favoured": "unequal/order",
    "any_language": "language",
    "hanging_pattern": "hangs",
    "echo": "exploit/the prompt",
    "reads_thinking": "exploit/right in the thinking",
    "starts_with": "choice/hedged",
    "wide_tolerance": "exploit/wrong answer",
    "nan_is_near": "exploit/special values",
    "gullible_judge": "exploit/orders to the grader",
    "abstains_when_wrong": "unscored",
    "digits_glued": "exploit/wrong answer",
}


def reward_of(case: Case) -> RewardSet:
    if case.hangs:
        path = f"{case.function.__code__.co_filename}:{case.name}"
        return RewardSet((Part(name="r", reward=Function(name=path, timeout_s=0.4)),))
    return RewardSet((Part(name="r", reward=InProcess(case.function)),))


def findings(case: Case) -> dict[str, str]:
    """Rules that fired, with their severities."""
    reward = reward_of(case)
    try:
        seen = examine(reward, PROBLEMS[case.topic], template=case.layout)
    finally:
        reward.close()
    return {finding.rule: finding.severity for finding in judge(seen)}


@pytest.mark.parametrize("case", FLAWED, ids=lambda case: case.name)
def test_every_flaw_is_found(case):
    found = findings(case)
    severity = "warning" if RULES[case.name] in WARNINGS else "error"
    assert found.get(RULES[case.name]) == severity, found


WARNINGS = {"choice/several", "choice/hedged", "language"}


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_a_sound_reward_gets_notes_at_most(case):
    assert set(findings(case).values()) <= {"note"}


def case_of(name: str) -> Case:
    return next(case for case in (*FLAWED, *SOUND) if case.name == name)


def test_shares_are_against_the_right_answer_to_the_same_problem():
    """0.1 for the layout, 1 for the answer: a wrong answer in perfect layout is worth a tenth."""
    seen = examine(
        reward_of(case_of("layout_pays_little")), PROBLEMS["sums"], template=R1, max_tokens=4000
    )
    wrong = next(trial for trial in seen.trials if trial.attack == "wrong answer")
    assert share(seen, wrong) == pytest.approx(0.1)
    rows = {row.attack: row for row in table(seen)}
    assert rows["nothing"].share == 0.0
    assert rows["wrong answer"].total_share == pytest.approx(0.1)
    assert rows["right, dressed up"].share == 1.0


def test_a_declared_minimum_is_the_zero_of_shares():
    """-1 for wrong and 1 for right: with minimum = -1 a wrong answer is worth nothing, not -1."""
    function = InProcess(case_of("plus_minus").function)
    reward = RewardSet((Part(name="r", reward=function, minimum=-1.0),))
    seen = examine(reward, PROBLEMS["sums"], template="<answer>{answer}</answer>")
    wrong = next(trial for trial in seen.trials if trial.attack == "wrong answer")
    assert share(seen, wrong) == 0.0
    assert judge(seen)[0].severity == "note"


def test_the_threshold_decides_what_an_exploit_is():
    def tenth_more(data_source, solution_str, ground_truth, extra_info=None):
        return 1.0 if solution_str == ground_truth else 0.6

    reward = RewardSet((Part(name="r", reward=InProcess(tenth_more)),))
    seen = examine(reward, PROBLEMS["sums"], template="{answer}")
    assert [f.rule for f in judge(seen, threshold=0.6) if f.severity == "error"] == []
    assert "exploit/nothing" in {f.rule for f in judge(seen, threshold=0.59)}
    with pytest.raises(ValueError, match=r"threshold = 1.5: must lie between 0 and 1"):
        judge(seen, threshold=1.5)


def test_other_parts_must_not_outweigh_the_task():
    """Tags worth four: they pay as much as the answer, which the task part alone does not show."""
    right = Part(name="right", reward=InProcess(case_of("exact_tag").function))
    tags = Part(name="tags", reward=InProcess(case_of("tags_alone").function), weight=4.0)
    long = Part(name="long", reward=InProcess(case_of("length_alone").function), weight=4.0)
    seen = examine(RewardSet((right, tags)), PROBLEMS["sums"], template=R1)
    notes = {f.rule: f.severity for f in judge(seen)}
    assert notes["total"] == "note"  # 4 of 5
    seen = examine(RewardSet((right, tags, long)), PROBLEMS["sums"], template=R1)
    assert {f.rule: f.severity for f in judge(seen)}["total"] == "error"


def test_what_a_box_bounds_is_not_called_slow():
    """Programs have the recipe's own limits: a note, where the other parts take no second."""
    seen = examine(reward_of(case_of("exact_tag")), PROBLEMS["sums"], template=R1)
    assert seen.boxed_s == 0
    found = [
        [
            f.severity
            for f in judge(replace(seen, slowest=("x", took), boxed_s=boxed))
            if f.rule == "slow"
        ]
        for took, boxed in ((0.9, 0.0), (2.1, 0.0), (2.1, 2.0), (90.1, 90.0), (15.1, 0.1))
    ]
    assert found == [[], ["warning"], ["note"], ["note"], ["warning"]]


def test_only_the_parts_that_run_programs_are_timed_as_boxed(monkeypatch):
    """Ten boxes a completion for a second each are ten seconds, of whatever else there is."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def score_batch(self, groups):
            clock[0] += seconds * sum(len(rows) for _, rows in groups)
            return [[0.0] * len(rows) for _, rows in groups]

        return score_batch

    monkeypatch.setattr(Code, "score_batch", takes(10.0))
    right = InProcess(case_of("exact_tag").function)
    parts = (Part(name="code", reward=Code()), Part(name="right", reward=right))
    seen = examine(RewardSet(parts), PROBLEMS["sums"][:1], template=R1)
    assert (seen.slowest[1], seen.boxed_s) == (10.0, 10.0)
    assert [f.severity for f in judge(seen) if f.rule == "slow"] == ["note"]


def test_an_unknown_layout_is_the_usual_one_that_scores_most():
    seen = examine(reward_of(case_of("boxed_last")), PROBLEMS["sums"], template=None)
    assert (seen.layout.template, seen.layout_is_known) == (r"\boxed{{answer}}", False)
    assert [score.task for score in seen.alone] == [1.0] * 4


def test_right_answers_that_fall_short_are_told():
    seen = examine(reward_of(case_of("hashes")), PROBLEMS["sums"], template="{answer}")
    finding = judge(seen)[0]
    assert (finding.severity, finding.rule) == ("error", "golden")
    assert finding.text.startswith("4 of 4 right answers, written as '{answer}', do not get")


def test_problems_without_answers_get_the_attacks_that_need_none():
    asked = [Problem(id="a", prompt=(Message("user", "Write a poem."),))]
    seen = examine(reward_of(case_of("tags_alone")), asked, template="{answer}")
    assert {trial.kind for trial in seen.trials} == {"blind"}
    assert [f.rule for f in judge(seen)] == ["golden"]  # a note: nothing to compare with
    with pytest.raises(ValueError, match="no problems"):
        examine(reward_of(case_of("tags_alone")), [], template="{answer}")


def test_wrong_answers_are_wrong():
    made = wrong_answers("72", ["72.0", "15"])
    assert made["the next number"] == "73"
    assert made["one digit more before it"] == "172"
    assert made["its digits the other way round"] == "27"
    assert made["of another problem, 2"] == "15"
    assert "of another problem, 1" not in made  # 72.0 is right
    assert not any(same("72", text) for text in made.values())
    assert wrong_answers("yes", []) == {"its letters the other way round": "sey"}
    assert wrong_answers("1/2", [])["a tenth more"] == "0.55"


def test_no_attack_is_right_by_chance():
    """Answers 1 and 10 stand in the orders to the grader, x among the special values."""
    problems = [problem(n, "Which?", gold) for n, gold in enumerate(("1", "10", "x"))]
    seen = examine(reward_of(case_of("exact_tag")), problems, template=R1)
    made = {trial.name: [score is not None for score in trial.scores] for trial in seen.trials}
    assert made["special values: x"] == [True, True, False]
    assert made["orders to the grader: as the answer, 2"] == [False, True, True]
    assert made["orders to the grader: as the answer, 4"] == [True, False, True]
    rows = {row.attack: row.share for row in table(seen) if row.kind == "blind"}
    assert set(rows.values()) == {0.0}


def test_candidates_hide_the_right_one_in_the_middle():
    for gold, elsewhere in (("5", ["1"]), ("5", ["1", "2"]), ("5", [str(n) for n in range(6, 29)])):
        listed = among(gold, elsewhere)
        assert listed.count(gold) == 1
        assert gold not in (listed[0], listed[-1])
    assert set(others("5", ["5", "7", "5.0", "9", "7"], "x")) == {"7", "9"}


def test_a_layout_is_taken_apart():
    layout = Layout(R1)
    assert layout.say("", "") == "<think></think><answer></answer>"
    assert layout.cut_short("72") == "<think>Let me see.</think><answer>72<"
    assert layout.say_at_length("72", "so") == "<think>so</think><answer>72</answer>"
    boxed = Layout(r"\boxed{{answer}}")
    assert (boxed.is_marked, boxed.thinking) == (True, "")
    assert boxed.cut_short("72") == r"\boxed{72"
    assert boxed.say_at_length("72", "so") == "so\n\\boxed{72}"
    assert not Layout("{answer}").is_marked
    assert Layout("<think>fine</think>{answer}").say("7", "hm") == "<think>finehm</think>7"


def test_length_correlation_is_pearson_s():
    rising = correlate("samples of the model", [(float(n), 2.0 * n) for n in range(16)])
    assert rising.correlation == pytest.approx(1.0)
    assert [f.rule for f in judge_lengths(rising)] == ["length/samples"]
    assert math.isnan(correlate("samples of the model", [(1.0, 1.0), (2.0, 1.0)]).correlation)
    seen = examine(reward_of(case_of("length_alone")), PROBLEMS["sums"][:1], template=R1)
    made = made_lengths(seen)
    assert made.count == len(seen.trials)
    assert made.correlation > 0.8
    assert judge_lengths(made) == []  # made completions are no evidence


def test_a_judge_is_asked_again_and_not_its_memory():
    """A judge that says another number each time; its cache would hide that."""

    def answer(number, body):
        return chat({"reason": "", "score": number % 10})

    with answering(answer) as server:
        model = GradingModel(name="fickle", keep="memory")
        reward = Judge(rubric="r", model=model, service=Service(url=server.url, backoff_s=0.01))
        rewards = RewardSet((Part(name="r", reward=reward),))
        seen = examine(rewards, PROBLEMS["sums"][:1], template="{answer}")
    assert "unequal/again" in [finding.rule for finding in judge(seen)]


def test_services_are_waited_for_a_short_while():
    slow = Service(url="http://127.0.0.1:9", timeout_s=500.0, deadline_s=5000.0, retries=9)
    kept = Service(url="http://127.0.0.1:9", timeout_s=1.0, deadline_s=2.0, retries=0)
    model = GradingModel(name="m", keep="disk")
    parts = (
        Part(name="a", reward=Remote(service=slow)),
        Part(name="b", reward=Remote(service=kept)),
        Part(name="c", reward=Judge(rubric="r", model=model, service=slow)),
        Part(name="d", reward=Verifiers()),
    )
    first, second, third, fourth = (part.reward for part in with_deadline(RewardSet(parts)).parts)
    short = (10.0, 120.0, 1)
    assert (first.service.timeout_s, first.service.deadline_s, first.service.retries) == short
    assert second.service == kept
    assert (third.service.retries, third.model.keep) == (1, "none")
    assert fourth.timeout_s == 10.0


def test_parts_that_read_episodes_are_left_out():
    case = case_of("exact_tag")
    parts = (
        Part(name="tools", reward=ToolUse()),
        Part(name="r", reward=InProcess(case.function), gate=Gate(part="tools")),
    )
    seen = examine(RewardSet(parts, task=("tools", "r")), PROBLEMS["sums"], template=R1)
    assert seen.skipped == ("tools",)
    assert [score.task for score in seen.alone] == [1.0] * 4
    assert [(f.severity, f.rule) for f in judge(seen)][-1] == ("note", "skipped")
    game = RewardSet((Part(name="game", reward=EnvironmentReward()),))
    with pytest.raises(ValueError, match=r"reward\.parts\.game reads what an environment says"):
        examine(game, PROBLEMS["sums"], template=R1)
