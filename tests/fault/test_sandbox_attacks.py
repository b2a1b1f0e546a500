"""Hostile programs in every kind of box, as this user and as another: none harms, none is paid."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from gruppo.sandbox import Pool, Sandbox, choose
from gruppo.sandbox.compiled import for_compiling
from support.attack import LIMITS, Attack
from support.attacks import ATTACKS, HARMLESS
from support.attacks_compiled import COMPILED, COMPILED_HARMLESS, COMPILER, PROGRAM
from support.boxes import linux, needs_wasi
from support.wasi import shared_cache

CHILD = Path(__file__).parents[1] / "support" / "attack_child.py"
USER = 61_111
ALL_S = 1200  # a compiler is attacked for ten processor seconds at a time
LATE_S = 1.0  # beyond a limit
BUSY_S = 10.0  # on the clock, for a box's start and end where other programs want the processor
GROWN_MIB = 64  # some megabytes of each box at a time, and sixteen compiled programs
PLAIN_PYTHON = "/usr/bin/python3"  # one that an ordinary user can reach

pytestmark = linux
KINDS = [kind for kind in ("bubblewrap", "lite") if kind == "lite" or shutil.which("bwrap")]
BOXES = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(kind not in KINDS, reason="bubblewrap is not installed"),
    )
    for kind in ("bubblewrap", "lite")
]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(PLAIN_PYTHON),
    reason=f"becoming another user needs root, and {PLAIN_PYTHON} for it",
)


def attacked(jobs: list[str], *, uid: int = 0) -> dict:
    """What the attacks came to, by kind of box, run in a process of their own."""
    # not pytest's folder: other users cannot reach that
    with tempfile.TemporaryDirectory() as folder, ExitStack() as context:
        os.chmod(folder, 0o777)
        if any(job.startswith("wasi") for job in jobs):
            context.enter_context(shared_cache())
        done = subprocess.run(
            [sys.executable, CHILD, str(uid), ",".join(jobs), PLAIN_PYTHON if uid else "", folder],
            capture_output=True,
            text=True,
            timeout=ALL_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def unfair(values: dict, attacks: Sequence[Attack]) -> dict:
    """Scores that are neither 0, nor the completion's own failure, nor fairly earned."""
    fair = {attack.name for attack in attacks if attack.earns}
    return {
        name: value
        for name, value in values.items()
        if value != 0.0
        and not (isinstance(value, list) and value[0] == "completion")
        and not (value == 1.0 and name in fair)
    }


def processor() -> float:
    """Processor seconds of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of(attacks: Sequence[Attack], which: str) -> list[Attack]:
    return [attack for attack in attacks if attack.slow == (which == "slow")]


def check_survived(result: dict, attacks: Sequence[Attack]) -> None:
    assert list(result["values"]) == [attack.name for attack in attacks]
    assert unfair(result["values"], attacks) == {}
    assert result["changed"] == []
    assert result["leftovers"] == []
    assert result["next"] == 1.0
    assert result["grown_mib"] < GROWN_MIB


def check_in_time(result: dict, attacks: Sequence[Attack]) -> None:
    """Each ended at its limit: of processor time, or where it sleeps, on the clock.

    An attack on a compiler meets that one's limits, and then those of its program. An honest
    program's processor time is subtracted: boxes start alike for both, and compilers run.
    """
    programs, compiling = Sandbox(**LIMITS), for_compiling(Sandbox(**LIMITS))
    clock = {"build": compiling.wall + LATE_S + BUSY_S, "run": programs.wall + LATE_S + BUSY_S}
    late = {}
    for attack, took in zip(attacks, result["times"], strict=True):
        limits = compiling if attack in COMPILER else programs
        used = took["processor"] - result["own"]["processor"]
        if used > limits.cpu_s + LATE_S or any(took[step] > most for step, most in clock.items()):
            late[attack.name] = took
    assert late == {}


@pytest.fixture(scope="module")
def quick() -> dict:
    """The quick attacks in every box, and the harmless ones without any."""
    return attacked([*(f"{kind}:quick" for kind in KINDS), "unsafe-none:harmless"])


@pytest.mark.parametrize("kind", BOXES)
def test_no_attack_is_paid_or_harms(kind: str, quick: dict) -> None:
    result = quick[kind]
    check_survived(result, of(ATTACKS, "quick"))
    assert result["values"]["read a file"] == 0.0
    assert result["values"]["fork bomb"] == 1.0  # it also solves the problem
    assert result["values"]["hard exit"] == ["completion", "exit_0"]
    assert result["values"]["a text of 1 GB"] == ["completion", "MemoryError"]
    assert result["values"]["a reply of 1 GB"] == ["completion", "oversize"]


def test_without_a_box_harmless_attacks_succeed(quick: dict) -> None:
    """These tests can fail: the same programs win, and change the host, where nothing isolates."""
    result = quick["unsafe-none"]
    assert set(result["values"]) == set(HARMLESS)
    assert set(result["values"].values()) == {1.0}
    assert result["changed"] == ["status"]


@pytest.mark.slow
@pytest.mark.timeout(ALL_S)
def test_attacks_that_run_to_a_limit() -> None:
    for result in attacked([f"{kind}:slow" for kind in KINDS]).values():
        check_survived(result, of(ATTACKS, "slow"))
        check_in_time(result, of(ATTACKS, "slow"))
        assert result["values"]["endless loop"] == ["completion", "timeout"]
        assert result["values"]["signals ignored"] == ["completion", "timeout"]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.mark.slow
@pytest.mark.timeout(ALL_S)
@needs_compiler
@pytest.mark.parametrize("which", ["quick", "slow"])
@pytest.mark.parametrize("uid", [0, pytest.param(USER, marks=needs_root)])
def test_no_compiled_attack_is_paid_or_harms(which: str, uid: int) -> None:
    for result in attacked([f"{kind}:cpp-{which}" for kind in KINDS], uid=uid).values():
        check_survived(result, of(COMPILED, which))
        values = result["values"]
        refused = {name for name, v in values.items() if v == ["completion", "compile_error"]}
        assert not refused & {attack.name for attack in PROGRAM}  # those did run
        if which == "quick":
            assert values["include passwd"] == ["completion", "compile_error"]
            assert values["incbin"] == ["completion", "compile_error"]
            assert values["read a file"] == values["exec an open file"] == 0.0
            assert values["fork bomb"] == 1.0  # it also solves the problem
            assert values["a text of 1 GB"] == ["completion", "oversize"]
        else:
            check_in_time(result, of(COMPILED, which))
            assert values["endless loop"] == ["completion", "timeout"]
            assert values["template explosion"][0] == "completion"


@pytest.mark.slow
@needs_compiler
def test_without_a_box_harmless_compiled_attacks_succeed() -> None:
    result = attacked(["unsafe-none:cpp-harmless"])["unsafe-none"]
    assert result["values"] == dict.fromkeys(COMPILED_HARMLESS, 1.0)
    assert result["changed"] == ["status"]


@pytest.mark.slow
@pytest.mark.timeout(ALL_S)
@needs_wasi
@pytest.mark.parametrize("uid", [0, pytest.param(USER, marks=needs_root)])
def test_no_attack_is_paid_or_harms_in_the_wasi_box(uid: int) -> None:
    """Those that need ctypes, processes or other modules that it lacks fail at that."""
    result = attacked(["wasi:quick"], uid=uid)["wasi"]
    check_survived(result, of(ATTACKS, "quick"))
    assert result["values"]["read a file"] == 0.0
    assert result["values"]["hard exit"] == ["completion", "exit_0"]
    result = attacked(["wasi:slow"], uid=uid)["wasi"]
    check_survived(result, of(ATTACKS, "slow"))
    check_in_time(result, of(ATTACKS, "slow"))
    assert result["values"]["endless loop"] == ["completion", "timeout"]


@pytest.mark.slow
@pytest.mark.timeout(ALL_S)
@needs_root
@pytest.mark.parametrize("which", ["quick", "slow"])
def test_the_same_as_an_ordinary_user(which: str) -> None:
    for result in attacked([f"{kind}:{which}" for kind in KINDS], uid=USER).values():
        check_survived(result, of(ATTACKS, which))
        if which == "slow":
            check_in_time(result, of(ATTACKS, which))


@pytest.mark.parametrize("kind", BOXES)
def test_an_endless_loop_is_ended_by_the_limit_of_processor_time(kind: str) -> None:
    """Not by the clock, which is only the backstop."""
    settings = Sandbox(kind=kind, cpu_s=1, wall_s=120.0, memory_mib=256)
    pool = Pool(lambda: choose(settings).backend, settings, 1)
    pool.map(lambda fresh, text: fresh().script(text, b""), ["pass"])  # the box is tried
    before = processor()
    [outcome] = pool.map(lambda fresh, text: fresh().script(text, b""), ["while True: pass"])
    used = processor() - before
    pool.close()
    assert (outcome.ended, outcome.code) == ("cpu", signal.SIGKILL)
    assert 0.9 < used < settings.cpu_s + LATE_S


NAIVE = """
import json, sys
expected = {3: 1_000_000_000_003}
space = {}
exec(sys.argv[1], space)
passed = space["solve"](3) == expected[3]
print(json.dumps({"passed": passed}))
"""


@pytest.mark.parametrize(
    "cheat",
    [
        "class Same:\n    def __eq__(self, other): return True\ndef solve(n): return Same()",
        "import sys\ndef solve(n): return sys._getframe(1).f_globals['expected'][n]",
        "import os\nprint('{\"passed\": true}', flush=True)\nos._exit(0)",
    ],
    ids=["always equal", "tests from frames", "spoofed result"],
)
def test_a_checker_that_trusts_the_program_is_cheated(cheat: str) -> None:
    """What the box's design prevents: here the verdict is made where the program runs."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", NAIVE, cheat], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"passed": True}
