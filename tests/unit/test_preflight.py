"""Preflight: intervals against closed forms and simulation, costs by hand, the two commands."""

import json
import math

import numpy as np
import pytest

from gruppo.cli import main
from gruppo.cli.written import printable
from gruppo.model.footprint import Shape
from gruppo.preflight import machine
from gruppo.preflight.advice import Facts, advise
from gruppo.preflight.microbatch import largest_micro_batches
from gruppo.preflight.report import Size, group_seconds, histogram, worth
from gruppo.preflight.statistics import (
    Dead,
    Interval,
    agreement,
    beta_agreement,
    dead_share,
    mean_interval,
    wilson,
)
from gruppo.preflight.timing import Timing, draws_per_step, skips_dead
from gruppo.recipe import load
from gruppo.types import Completion, Group, Message, Problem, Score
from support.commands import arguments


def test_agreement_is_unbiased_for_a_known_pass_rate():
    """Over all 2^6 outcomes of six draws at p = 0.3: mean = p^3 + q^3 exactly."""
    p, total = 0.3, 0.0
    for bits in range(64):
        draws = [bits >> n & 1 for n in range(6)]
        chance = math.prod(p if draw else 1 - p for draw in draws)
        total += chance * agreement(draws, 3)
    assert total == pytest.approx(p**3 + (1 - p) ** 3)
    assert agreement([0.5, 0.5 + 1e-9, 1.0], 2) == pytest.approx(1 / 3)  # float noise agrees


def test_beta_agreement_has_a_closed_form():
    """p uniform: E[p^G + q^G] = 2 / (G + 1); a Beta(2, 1) at G = 2: 1/2 + 1/6."""
    assert beta_agreement(1, 1, 7) == pytest.approx(0.25)
    assert beta_agreement(2, 1, 2) == pytest.approx(1 / 2 + 1 / 6)


def test_the_interval_of_zeros_and_ones_is_jeffreys():
    """Beta(1/2, 10 + 1/2) for 0 of 10, Beta(5.5, 5.5) for 5 of 10, as tabulated."""
    none = mean_interval([0.0] * 10)
    assert (none.low, none.value) == (0.0, 0.0)
    assert none.high == pytest.approx(0.2172, abs=0.01)
    half = mean_interval([0.0] * 5 + [1.0] * 5)
    assert (half.low, half.high) == pytest.approx((0.2235, 0.7765), abs=0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([1.5])


def test_what_a_run_will_measure_is_less_certain():
    """Of 400 runs of 30 problems, after as many tried: 95 % intervals hold at least 370 times.

    Those of the mean over all problems hold the run's less than 350 times.
    """
    draw, hold, mean_holds = np.random.default_rng(5), 0, 0
    for _ in range(400):
        tried, run = draw.beta(1.0, 2.0, size=(2, 30))
        hold += float(run.mean()) in mean_interval(tried.tolist(), future=30)
        mean_holds += float(run.mean()) in mean_interval(tried.tolist())
    assert (hold >= 370, mean_holds < 350) == (True, True)
    sure = mean_interval([0.5] * 30, future=10**9)
    assert (sure.low, sure.high) == pytest.approx(
        (mean_interval([0.5] * 30).low, mean_interval([0.5] * 30).high), abs=1e-3
    )
    # chances of 1/2 all alike: the mean of 25 coins has a deviation of 1/10
    coins = mean_interval([0.5] * 1000, future=25, binary=True)
    assert (coins.low, coins.high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=0.01)


def drawn_group(*totals: float, prompt: int, lengths: tuple[int, ...]) -> Group:
    return Group(
        problem=Problem(id="p", prompt=(Message("user", "?"),)),
        prompt_tokens=tuple(range(prompt)),
        completions=tuple(
            Completion(
                tokens=(1,) * length,
                logp=(-1.0,) * length,
                finish="stop",
                mask=(True,) * length,
                version=(0,) * length,
                text="",
            )
            for length in lengths
        ),
        scores=tuple(Score(total=total, task=total) for total in totals),
    )


def test_the_largest_micro_batch_of_groups_that_teach():
    """One group of three teaches: 7 + 3 + 5 tokens; two of them never fit into 20."""
    groups = [
        drawn_group(0.0, 0.0, prompt=9, lengths=(8, 9)),
        drawn_group(0.0, 1.0, prompt=7, lengths=(3, 5)),
        drawn_group(1.0, 1.0, prompt=6, lengths=(4, 2)),
    ]

    def largest(**other):
        ways = {"size": 2, "budget": 20, "steps": 99, "packed": True, "skips": True}
        found = largest_micro_batches(groups, **{**ways, "resamples": False, **other})
        assert [each.alone for each in found] == sorted({each.alone for each in found})[::-1]
        last = found[-1]  # beside others, if there is such a one
        return last.shape.prompts, [list(part) for part in last.shape.completions], last.alone

    assert largest() == ([7], [[3, 5]], False)  # two of the group that teaches, one pass each
    assert largest(budget=30) == ([7, 7], [[3, 5], [3, 5]], True)
    assert largest(size=1) == ([7], [[3, 5]], True)
    assert largest(size=1, packed=False) == ([7], [[5]], False)
    assert largest(size=1, packed=False, budget=24) == ([7, 7], [[5], [5]], True)  # padded to 12
    assert largest(size=1, skips=False) == ([9], [[9]], False)  # the other row is a pass of its own
    assert largest(size=1, skips=False, budget=26) == ([9], [[8, 9]], True)
    assert largest(resamples=True, budget=30) == ([7, 7], [[3, 5], [3, 5]], True)
    # where none teaches the largest counts as if it did; a step without it passes the shortest row
    dead = [groups[0], groups[2]]
    ways = {"size": 1, "steps": 9, "packed": True, "skips": True, "resamples": False}
    found = largest_micro_batches(dead, budget=26, **ways)
    assert [each.shape for each in found] == [Shape(prompts=[9], completions=[[8, 9]])]
    few = largest_micro_batches([groups[1], *[groups[2]] * 40], budget=26, **{**ways, "steps": 1})
    assert [each.shape for each in few] == [Shape(prompts=[6], completions=[[2]])]


def test_the_share_of_dead_groups_that_a_run_will_measure():
    """Groups of four, pass rates Beta(1, 3): forty tried, forty in the run; 200 times."""
    draw, hold = np.random.default_rng(8), 0
    for _ in range(200):
        hits = draw.binomial(4, draw.beta(1.0, 3.0, size=(2, 40)))
        rows = [[1.0] * int(hit) + [0.0] * (4 - int(hit)) for hit in hits[0]]
        dead = float(np.mean((hits[1] == 0) | (hits[1] == 4)))
        hold += dead in dead_share(rows, 4, future=40).share
    assert hold >= 183


def test_wilson_by_hand():
    interval = wilson(3, 20)
    assert (interval.low, interval.high) == pytest.approx((0.0524, 0.3604), abs=1e-4)


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("shape", [(0.3, 0.3), (1.0, 3.0), (0.1, 2.0)])
def test_intervals_cover_the_expected_dead_share(shape, group):
    """Forty problems of eight completions, forty times: 95 % intervals cover at least 35 times.

    Sixteen completions were not drawn: those intervals come from the model.
    """
    draw = np.random.default_rng(3)
    truth, covered = beta_agreement(*shape, group), 0
    for _ in range(40):
        rates = draw.beta(*shape, size=40)
        rows = [(draw.random(8) < rate).astype(float).tolist() for rate in rates]
        found = dead_share(rows, group)
        assert found.method == ("counted" if group <= 8 else "modelled")
        covered += truth in found.share
    assert covered >= 35


def test_intervals_cover_where_pass_rates_are_no_beta():
    """Half of the problems never solved, the others half of the time: 1/2 + 1/2 * 2/2^4."""
    draw = np.random.default_rng(4)
    truth, covered = 0.5 + 0.5 * 2 * 0.5**4, 0
    for _ in range(60):
        rates = np.where(draw.random(32) < 0.5, 0.0, 0.5)
        rows = [(draw.random(4) < rate).astype(float).tolist() for rate in rates]
        covered += truth in dead_share(rows, 4).share
    assert covered >= 53


def test_dead_shares_of_other_rewards():
    """Three values: counted by agreement, and not modelled; -1 and 1 are two values."""
    rows = [[0.0, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 0.5]]
    assert dead_share(rows, 2).share.value == pytest.approx((1 / 6 + 1) / 2)
    assert dead_share(rows, 8) is None
    assert dead_share([[-1.0, 1.0]] * 20, 4).method == "modelled"
    assert dead_share([[0.0, 0.0]] * 20, 4).share.value > 0.9
    assert dead_share([[1.0, 1.0]] * 20, 4).share.value > 0.9


def test_histogram_counts_problems():
    shares = histogram([0.0, 0.25, 0.26, 0.5, 0.9, 1.0, 1.0])
    values = {name: round(share.value * 7) for name, share in shares.items()}
    assert values == {
        "0": 1,
        "0 to 25 %": 1,
        "25 to 50 %": 2,
        "50 to 75 %": 0,
        "75 to 100 %": 1,
        "100 %": 2,
    }
    assert histogram([]) == {}


def timing(**changes: float) -> Timing:
    zero = dict.fromkeys(("sampling", "scoring", "evidence", "update", "optimizer"), 0.0)
    return Timing(
        **{**zero, "per_drawn_token": 2.0, "per_trained_token": 3.0, "batches": 1} | changes
    )


def test_a_shared_prompt_makes_larger_groups_cheaper():
    """Prompt 10, completions of 5. Shared: (10 read + 5 G drawn at 2) + (10 + 5 G) trained at 3."""
    parts = {"prompt": 10.0, "length": 5.0, "timing": timing(), "skips": True}
    assert group_seconds(4, live=1.0, packed=True, **parts) == 10 + 40 + 90
    assert group_seconds(8, live=1.0, packed=True, **parts) == 10 + 80 + 150
    assert group_seconds(4, live=0.5, packed=True, **parts) == 10 + 40 + 45
    assert group_seconds(4, live=1.0, packed=False, **parts) == 40 + 40 + 180
    assert group_seconds(4, live=0.5, packed=True, **parts | {"skips": False}) == 140


def test_what_was_read_from_files_counts_as_free(tmp_path, monkeypatch):
    """Of 512 MiB of a container 500 are used, 300 of them by a cache that can be given up."""
    mib = 2**20
    (tmp_path / "memory.max").write_text(f"{512 * mib}\n")
    (tmp_path / "memory.current").write_text(f"{500 * mib}\n")
    (tmp_path / "memory.stat").write_text(f"anon 9\ninactive_file {300 * mib}\n")
    monkeypatch.setattr(machine, "_CONTAINER", tmp_path)
    given = {"MemAvailable:": 9000 * mib, "VmRSS:": 100 * mib}
    read = machine._field
    monkeypatch.setattr(
        machine, "_field", lambda path, name, **unit: given.get(name) or read(path, name, **unit)
    )
    assert machine.available_bytes(load("quickstart", ["model.device=cpu"])) == 412 * mib


def size(group: int, dead: float, seconds: float) -> Size:
    share = Interval(dead, dead, dead)
    return Size(
        dead=Dead(group=group, share=share, method="counted"),
        seconds=seconds,
        seconds_per_live=seconds / max(1 - dead, 1e-6),
    )


def test_the_size_worth_it_has_the_cheapest_live_group():
    sizes = [size(2, 0.1, 1.0), size(4, 0.8, 4.0), size(8, 0.6, 7.0), size(16, 0.5, 13.0)]
    assert worth(sizes) == 8  # 20, 17.5, 26; two completions are no baseline
    assert worth([size(4, 1.0, 4.0)]) is None


def facts(**changes: object) -> Facts:
    usual = {
        "pass_rate": Interval(0.3, 0.4, 0.5),
        "dead": Interval(0.1, 0.2, 0.3),
        "worth": 4,
        "seconds_per_live": {4: 1.0, 8: 1.1},
        "truncation": Interval(0.0, 0.02, 0.1),
        "longest": 31,
        "unscored": 0.0,
        "unique": 1.0,
        "scoring_share": 0.01,
        "run_seconds": 100.0,
        "likely": 2**30,
        "peak": 2**30,
        "available": 8 * 2**30,
        "problems": 1500,
        "draws": 1.0,
        "total_varies": True,
    }
    return Facts(**usual | changes)


ALL_DEAD = Interval(0.9, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "rule", "severity", "fix"),
    [
        ({"dead": ALL_DEAD, "pass_rate": Interval(0, 0, 0.1)}, "dead", "error", "easier"),
        ({"dead": ALL_DEAD, "pass_rate": ALL_DEAD}, "dead", "error", "harder"),
        ({"dead": Interval(0.5, 0.6, 0.7)}, "dead", "warning", '"resample"'),
        ({"truncation": Interval(0.2, 0.4, 0.6)}, "truncation", "error", "max_tokens = 64"),
        ({"longest": 5}, "max_tokens", "note", "max_tokens = 16"),
        ({"unscored": 0.5}, "unscored", "error", "reward test"),
        ({"unique": 0.3}, "repeated", "warning", "temperature"),
        ({"scoring_share": 0.6}, "reward time", "warning", "workers"),
        ({"peak": 9 * 2**30}, "memory", "warning", "tokens_per_microbatch"),
        (
            {"likely": 9 * 2**30, "peak": 9 * 2**30},
            *("memory", "error", "tokens_per_microbatch"),
        ),
        ({"worth": 8, "seconds_per_live": {4: 2.0, 8: 1.0}}, "group_size", "warning", "= 8"),
        ({"problems": 10}, "epochs", "warning", "more data"),
    ],
)
def test_advice(change, rule, severity, fix):
    (found,) = advise(load("quickstart"), facts(**change))
    assert (found.rule, found.severity) == (rule, severity)
    assert fix in found.fix


def test_a_sound_recipe_gets_no_advice():
    assert advise(load("quickstart"), facts()) == []


def test_advice_on_the_schedule():
    slow = load("quickstart", ["optim.warmup_steps=30", "train.time_limit_s=50"])
    found = {advice.rule: advice.fix for advice in advise(slow, facts())}
    assert found == {"warm-up": "optim.warmup_steps = 1", "time": "train.steps = 10"}


def test_what_a_step_draws_and_trains():
    resample = load("quickstart", ['rollout.filter="resample"', "rollout.max_gen_batches=5"])
    assert draws_per_step(resample, 0.5) == 2.0
    assert draws_per_step(resample, 0.0) == 5.0
    assert draws_per_step(load("quickstart"), 0.0) == 1.0
    keep = load("quickstart", ['rollout.filter="keep"'])
    held = load("quickstart", ["objective.kl={beta = 0.1}"])
    found = [skips_dead(r, r.objective.build(max_tokens=8)) for r in (resample, keep, held)]
    assert found == [True, False, False]
    plain = load("quickstart")
    assert skips_dead(plain, plain.objective.build(max_tokens=8))


@pytest.fixture
def tiny(tiny_folder):
    """Settings of a run of the tiny model."""
    return arguments(tiny_folder, "x")


def test_preflight_of_the_tiny_model(tiny, tmp_path, capsys):
    output = tmp_path / "found" / "preflight.json"
    assert main(["preflight", "quickstart", *tiny, "--groups", "5", "--json", str(output)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("6 groups, 12 completions, drawn in ")  # three batches of two
    assert any(line.startswith("rollout.prompts_per_step = 2: ") for line in lines)
    assert "optimizer steps: 4" in lines
    assert "drawn: 5 of 5 groups" in shown.err
    found = json.loads(output.read_text())
    assert (found["groups"], found["completions"], found["optimizer_steps"]) == (6, 12, 4)
    assert found["updates_per_rollout"] == 1
    assert sum(share["value"] for share in found["histogram"].values()) == pytest.approx(1.0)
    assert [s["dead"]["group"] for s in found["sizes"]] == [2, 4, 8, 16, 32, 64]
    assert [s["dead"]["method"] for s in found["sizes"]][:2] == ["counted", "modelled"]
    phases = ("sampling", "scoring", "evidence", "forward_backward", "optimizer")
    assert found["seconds"]["step"] == pytest.approx(sum(found["seconds"][p] for p in phases))
    assert found["run_seconds"] == pytest.approx(
        4 * found["seconds"]["step"] + found["evaluation_seconds"]
    )
    rules = {advice["rule"]: advice["severity"] for advice in found["advice"]}
    assert rules["truncation"] == "error"  # random bytes hardly ever end
    assert rules["warm-up"] == "warning"  # 4 of 4 updates


def test_reward_test_of_a_sound_recipe(tmp_path, capsys):
    output = tmp_path / "lab.json"
    small = ["--set", "data.train.0.size=60", "--set", "data.held_out=3", "--problems", "3"]
    assert main(["reward", "test", "quickstart", *small, "--json", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1] == "3 of them score 1"
    assert "above 50% is an exploit" in shown
    assert shown.splitlines()[-2] == "0 errors, 0 warnings, 0 notes"
    found = json.loads(output.read_text())
    assert (found["threshold"], found["findings"]) == (0.5, [])
    assert found["golden"] == [1.0, 1.0, 1.0]
    assert found["length"]["of"] == "made completions"
    assert all(attack["share"] == 0 for attack in found["attacks"] if attack["kind"] == "blind")


def test_reward_test_of_an_exploitable_recipe_exits_with_1(tiny, capsys):
    command = ["reward", "test", "quickstart", *tiny, "--problems", "2", "--samples", "4"]
    assert main(command) == 1  # any letter from a to m is right
    shown = capsys.readouterr()
    assert "error exploit/the prompt: " in shown.out
    assert "  fix: grade one answer, in one place" in shown.out
    assert "(4 samples of the model)" in shown.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["reward", "test", "quikstart"], "did you mean 'quickstart'?"),
        (["reward", "test", "quickstart", "--threshold", "2"], "threshold = 2.0: must lie between"),
        (["reward", "test", "quickstart", "--problems", "0"], "problems = 0, samples = 0: there"),
        (["preflight", "quickstart", "--groups", "0"], "groups = 0: must be at least 1"),
        (["preflight", "quickstart", "--set", "train.stps=1"], 'did you mean "steps"?'),
    ],
)
def test_mistakes_exit_with_2(command, words, capsys):
    assert main(command) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""


def test_texts_of_attacks_cannot_play_with_the_terminal():
    assert printable("a\x1b[31mb\u202e\n") == r"a\x1b[31mb\u202e\n"
