"""The benchmark's arithmetic, and that it measures both systems on the same work."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gruppo import native
from gruppo.bench import curves, versus
from gruppo.bench import machine as measured
from gruppo.bench.curves import curve, positions
from gruppo.bench.measure import measure
from gruppo.bench.versus import Trl, versus_trl
from gruppo.bench.work import Work
from gruppo.cli import main
from gruppo.policy import Policy

SMALL = {"prompts": 2, "group": 4, "max_tokens": 3, "steps": 2, "warmup": 0, "compute": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts = 0: must be at least 1"),
        ({"group": 1}, "group = 1: a group needs at least 2"),
        ({"dead": 8}, "dead = 8: must be at least 0 and below prompts"),
        ({"beta": -0.1}, "beta = -0.1: must not be negative"),
    ],
)
def test_bad_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Work(**change)


def test_questions_come_from_the_file(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "one?"}\n{"question": "two?"}\n{"answer": 3}\n')
    assert Work(data=str(path)).questions(2) == ["one?", "two?"]
    with pytest.raises(ValueError, match=r'data\.jsonl:3: no text under "question"'):
        Work(data=str(path)).questions(3)
    path.write_text('{"question": "one?"}\n')
    with pytest.raises(ValueError, match="1 rows, 2 are needed"):
        Work(data=str(path)).questions(2)


@pytest.mark.parametrize("rank", [0, pytest.param(2, id="an adapter")])
def test_phases_add_up_on_the_tiny_model(tiny_folder: Path, rank: int):
    if rank:
        pytest.importorskip("peft")
    work = Work(model=str(tiny_folder), beta=0.04, lora_rank=rank, **SMALL)
    found = measure(work, gflops={"float32": 1e-3})
    seconds = found.seconds
    parts = ("sampling", "score", "reference", "forward_backward", "optimizer")
    assert seconds["step"] == pytest.approx(sum(seconds[name] for name in parts))
    assert found.sampled_per_s == pytest.approx(2 * 4 * 3 / seconds["sampling"])
    assert found.trained_per_s == pytest.approx(24 / (seconds["step"] - seconds["sampling"]))
    assert seconds["decode"] == max(0.0, seconds["sampling"] - seconds["prefill"])
    used = found.utilisation
    for name in ("reference", "old"):
        ratio = (2 if rank else 3) * seconds[name] / seconds["forward_backward"]
        assert used["forward_backward"] / used[name] == pytest.approx(ratio)
    assert found.padding == 0.0


def test_the_old_pass_is_over_the_whole_batch_and_no_part_of_a_step(tiny_folder, monkeypatch):
    scored: list[int] = []
    real = Policy.old_logp

    def spy(self, prompts, *rest):
        scored.append(len(prompts))
        return real(self, prompts, *rest)

    monkeypatch.setattr(Policy, "old_logp", spy)
    found = measure(Work(model=str(tiny_folder), **SMALL))
    assert scored == [8]
    phases = ("sampling", "score", "forward_backward", "optimizer")
    assert found.seconds["step"] == sum(found.seconds[name] for name in phases)


def test_dead_groups_are_not_passed_forward(tiny_folder: Path, monkeypatch):
    """Of 2 groups of 4 none, then one: 8 rows in a pass, then 4."""
    passed: list[int] = []
    real = Policy.logp

    def spy(self, prompts, *rest, **options):
        passed.append(len(prompts))
        return real(self, prompts, *rest, **options)

    monkeypatch.setattr(Policy, "logp", spy)
    for dead in (0, 1):
        measure(Work(model=str(tiny_folder), dead=dead, **{**SMALL, "steps": 1, "warmup": 0}))
    assert passed == [8, 4]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [((5.0, 2.0, 0.1), 2.0), ((0.3, 0.2, 0.1, 0.2, 0.01), 0.1), ((0.1, 0.95, 0.01), 0.95)],
    ids=["a slow type", "a fast type", "impatient"],
)
def test_the_first_product_does_not_count(monkeypatch, seconds: tuple[float, ...], best: float):
    """It chooses kernels; products are tried for a second, but one more than that always."""
    clock, left = [0.0], list(seconds)
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])

    def linear(*_: torch.Tensor) -> None:
        clock[0] += left.pop(0)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    found = measured._gflops("cpu", torch.float32, 4, 5, 6)
    assert found == pytest.approx(2 * 4 * 5 * 6 / best / 1e9)


def test_positions_count_a_prompt_once():
    assert positions(Work(prompts=2, group=8, max_tokens=10, prompt_tokens=100)) == 360


def test_a_curve_varies_one_thing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(curves.CURVES, "group", (2, 4))
    small = Work(model=str(tiny_folder), prompt_tokens=9, **SMALL)
    points = curve(small, "group")
    assert [(p["group"], p["positions"]) for p in points] == [(2, 2 * (9 + 6)), (4, 2 * (9 + 12))]
    with pytest.raises(ValueError, match='curve "size": use one of group'):
        curve(small, "size")


def test_ratios_are_of_medians():
    def run(sampling: float, step: float, peak: float) -> dict[str, object]:
        return {"seconds": {"sampling": sampling, "step": step}, "peak_gib": peak}

    compared = versus._compare(
        {
            "trl": [run(10, 30, 4), run(12, 36, 5), run(50, 99, 4)],
            "gruppo": [run(3, 8, 2), run(4, 9, 2.5), run(4, 9, 2)],
        }
    )
    assert compared["times_faster"] == {"sampling": 3.0, "training": 24 / 5, "step": 4.0}
    assert compared["memory_ratio"] == 0.5


def _rounds(**shares: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ by what other processes used meanwhile."""
    return {
        name: [{"round": number, "busy_cpus": share} for number, share in enumerate(given)]
        for name, given in shares.items()
    }


def test_disturbed_runs_do_not_count():
    runs = _rounds(trl=[0.02, 0.4, 0.1], gruppo=[0.7, 0.05, 0.0])
    quiet, dropped, said = versus._undisturbed(runs)
    left = {name: [run["round"] for run in kept] for name, kept in quiet.items()}
    assert left == {"trl": [0, 2], "gruppo": [1, 2]}
    assert dropped == ["trl in round 2", "gruppo in round 1"]
    assert said == (
        "other processes used more than 0.1 CPUs during trl in round 2, gruppo in round 1: "
        "not counted"
    )


def test_all_runs_count_where_a_system_has_no_undisturbed_one():
    runs = _rounds(trl=[0.02, 0.4], gruppo=[0.7, 0.2])
    quiet, dropped, said = versus._undisturbed(runs)
    assert (quiet, dropped) == (runs, [])
    assert said.endswith("gruppo in round 2: no other run of gruppo, so all count")
    calm = _rounds(trl=[0.0], gruppo=[0.1])
    assert versus._undisturbed(calm) == (calm, [], "")


def test_cpu_of_children_is_not_that_of_others(monkeypatch):
    """Of 7 CPU seconds in 2 s this process used 1 and its children 3 + 2."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(clock))
    busy, own = iter([100.0, 107.0]), iter([5.0, 6.0])
    monkeypatch.setattr(measured, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(measured.time, "process_time", lambda: next(own))
    used = iter([(1.0, 1.0), (4.0, 3.0)])

    def children(who: int) -> SimpleNamespace:
        assert who == measured.resource.RUSAGE_CHILDREN
        user, system = next(used)
        return SimpleNamespace(ru_utime=user, ru_stime=system)

    monkeypatch.setattr(measured.resource, "getrusage", children)
    with measured.watching() as others:
        pass
    assert others.share == 0.5


def test_both_systems_get_the_same_work(tiny_folder: Path, tmp_path: Path):
    """TRL is played by a script that checks what it was given."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "work = json.load(open(sys.argv[2]))\n"
        "assert (work['trl_weights'], work['trl_micro_batch']) == (work['compute'], 4)\n"
        "seconds = {'sampling': 2.0, 'step': 5.0 * len(work['questions'])}\n"
        "json.dump({'seconds': seconds, 'peak_gib': 1.0}, open(sys.argv[3], 'w'))\n"
    )
    stand_in.chmod(0o755)
    work = Work(model=str(tiny_folder), **SMALL)
    trl, peak = Trl(python=str(stand_in), micro_batch=4), {"float32": 1e-3}
    found = versus_trl(work, trl=trl, rounds=1, gflops=peak)
    assert found["seconds"]["trl"] == {"sampling": 2.0, "step": 20.0, "training": 18.0}
    ours = found["seconds"]["gruppo"]
    assert found["times_faster"]["step"] == pytest.approx(20.0 / ours["step"])
    used = found["runs"]["gruppo"][0]["utilisation"]
    passes = used["forward_backward"] * ours["forward_backward"]
    assert passes == pytest.approx(3 * used["old"] * ours["old"])
    with pytest.raises(ValueError, match="micro_batch = 3 does not divide"):
        versus_trl(work, trl=Trl(python=str(stand_in), micro_batch=3), rounds=1)
    with pytest.raises(ValueError, match="needs text prompts"):
        versus_trl(Work(prompt_tokens=5), trl=Trl(python="x"), rounds=1)
    with pytest.raises(ValueError, match="--lora-rank 4 cannot be given to TRL"):
        versus_trl(Work(lora_rank=4, compute="float32"), trl=Trl(python="x"), rounds=1)


def test_activations_that_are_kept_are_counted(tiny_folder, monkeypatch):
    """All tokens but each completion's last, which predicts nothing."""
    if not native.can_multiply(torch.float32):
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr("gruppo.bench.measure.faster_products", lambda device, dtype: "native")
    found = [
        measure(Work(model=str(tiny_folder), max_kept_gib=gib, **SMALL)).kept_tokens
        for gib in (0.0, 0.01)
    ]
    assert found == [0, 2 * 4 * (3 - 1)]
    with pytest.raises(ValueError, match="nothing is kept with plain"):
        Work(plain=True, max_kept_gib=1.0)


def test_the_command_writes_a_curve_and_a_picture_of_it(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("gruppo.bench.machine._SHAPES", ((64, 64, 64),))
    monkeypatch.setitem(curves.CURVES, "group", (2, 4))
    output = tmp_path / "curves.json"
    options = ["--prompts", "2", "--prompt-tokens", "9", "--max-tokens", "3", "--steps", "1"]
    options += ["--compute", "float32", "--curves", "group", "--output", str(output)]
    assert main(["bench", "--model", str(tiny_folder), *options]) == 0
    points = json.loads(output.read_text())["curves"]["group"]
    assert [(p["group"], p["positions"]) for p in points] == [(2, 2 * (9 + 6)), (4, 2 * (9 + 12))]
    assert all(p["sampling"] > 0 < p["training"] and p["other_cpus"] >= 0 for p in points)
    picture = output.with_suffix(".svg").read_text()
    assert picture.count("<!-- group -->") == 1  # what the panel varies, below its axis
    assert all(f"<!-- {name} -->" in picture for name in ("sampling", "training", "positions"))


def test_plain_drawing_tells_what_its_cache_took(tiny_folder: Path):
    """2 x 4 rows, 9 columns of prompt and 128 of room; 2 layers of 2 heads of 8 floats, twice."""
    work = Work(model=str(tiny_folder), plain=True, prompt_tokens=9, **SMALL)
    assert measure(work).cache_gib == 8 * 137 * 2 * (2 * 2 * 8 * 4) / 2**30


def test_the_command_writes_json(tiny_folder: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("gruppo.bench.machine._SHAPES", ((64, 64, 64),))
    output = tmp_path / "out" / "bench.json"
    options = ["--prompts", "2", "--group", "2", "--max-tokens", "2", "--steps", "1"]
    options += ["--compute", "float32", "--output", str(output)]
    told = ["bench", "--model", str(tiny_folder), *options]
    assert main(told) == 0
    found = json.loads(output.read_text())
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["measured"]["work"]["group"] == 2
    assert "forward_backward" in capsys.readouterr().out
    assert main(["bench", "--model", str(tiny_folder), "--curves", "size"]) == 2
