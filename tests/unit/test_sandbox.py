"""The sandbox as a library: what goes in and comes out, limits, and what dies with what."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gruppo.sandbox import (
    Box,
    Call,
    NoSandbox,
    Outcome,
    Pool,
    Returned,
    Sandbox,
    Unsendable,
    choose,
    decode,
    encode,
    family,
    same,
)
from gruppo.sandbox.choose import find
from gruppo.sandbox.lite import Lite, Unboxed
from gruppo.sandbox.python import library
from gruppo.sandbox.wasi import Wasi
from gruppo.sandbox.wire import check
from support.boxes import linux, needs_wasi, opened, script

SETTINGS = Sandbox(kind="lite", cpu_s=2, wall_s=10.0, memory_mib=256)


def run_script(source: str, settings: Sandbox = SETTINGS) -> Outcome:
    with opened(Lite, settings) as pool:
        return script(pool, source)


@pytest.fixture(
    scope="module",
    params=[pytest.param(Lite, marks=linux), pytest.param(Wasi, marks=needs_wasi)],
)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Boxes with the host's interpreter, and with the one that is compiled to WebAssembly."""
    backend = request.param()
    settings = Sandbox(kind=backend.kind, cpu_s=2, wall_s=60.0, memory_mib=256)
    with opened(lambda: backend, settings) as made:
        yield made


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(2**80),
        2.5,
        "a\udc80",
        b"\x00\xff",
        [1, [2]],
        (1, ("a",)),
        {1, 2},
        frozenset({"x"}),
        {"a": 1},
        {1: 2, (3,): None},
        {"$set": 1, "b": 2},
        1 + 2j,
        math.inf,
    ],
)
def test_values_survive_the_wire(value: object) -> None:
    back = decode(check(encode(value)))
    assert back == value
    assert type(back) is type(value)


class Number(int):
    """A subclass is no plain value."""


@pytest.mark.parametrize(
    "value",
    [object(), Number(3), [Number(3)], 1 << 70_000, print],
    ids=["object", "subclass", "inside", "large", "function"],
)
def test_other_values_do_not(value: object) -> None:
    with pytest.raises(Unsendable):
        encode(value)


def test_depth_and_size_are_bounded() -> None:
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(Unsendable, match="too deep"):
        encode(deep)
    with pytest.raises(Unsendable, match="too deep or too large"):
        check(deep)
    with pytest.raises(Unsendable, match="too deep or too large"):
        check([0] * 300_000)


@pytest.mark.parametrize(
    "form", [{"$run": 1}, {"$set": "abc"}, {"$dict": [1]}, {"$int": 3}, math.nan, {"$a": 1, "b": 2}]
)
def test_forms_of_nothing_are_refused(form: object) -> None:
    with pytest.raises(Unsendable):
        check(form)


def test_equality_minds_types_but_not_the_order_of_sets() -> None:
    assert same(encode({3, 1, 2}), encode({1, 2, 3}))
    assert same(encode({2: "b", 1: "a"}), encode({1: "a", 2: "b"}))
    assert same(0.0, -0.0)
    assert same(encode(math.nan), encode(math.nan))
    assert not same(1, True)
    assert not same(1, 1.0)
    assert not same(encode((1, 2)), encode([1, 2]))
    assert not same(encode({1}), encode(frozenset({1})))


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu_s", 0), ("memory_mib", 8), ("processes", 0), ("output_mib", 0), ("wall_s", -1.0)],
)
def test_limits_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sandbox\.{field} = {value}"):
        Sandbox(**{field: value})


def test_wall_clock_is_ten_times_the_processor_time() -> None:
    assert Sandbox(cpu_s=3).wall == 30.0
    assert Sandbox(cpu_s=3, wall_s=4.0).wall == 4.0


def test_a_script_gets_its_input_and_leaves_output_and_status(pool: Pool) -> None:
    source = "import sys\nprint(input()[::-1])\nprint('e', file=sys.stderr)\nexit(3)"
    outcome = script(pool, source, "abé\n".encode())
    assert (outcome.ended, outcome.code) == ("exit", 3)
    assert (outcome.stdout, outcome.stderr) == ("éba\n".encode(), b"e\n")


def test_large_input_arrives_whole(pool: Pool) -> None:
    outcome = script(pool, "import sys\nprint(len(sys.stdin.read()))", b"x" * 3_000_000)
    assert outcome.stdout == b"3000000\n"


@linux
def test_too_much_output_ends_the_program() -> None:
    outcome = run_script("print('x' * (2 << 20))")
    assert outcome.ended == "output"


@linux
def test_the_standard_library_is_there_and_nothing_else() -> None:
    source = "import heapq, decimal, statistics, zoneinfo\nimport torch"
    outcome = run_script(source)
    assert outcome.code == 1
    assert b"No module named 'torch'" in outcome.stderr


@linux
def test_installed_packages_cannot_be_read() -> None:
    found = library(SETTINGS.interpreter)
    hidden = [Path(path) for path in found.hidden]
    inside = [path for path in hidden if path.is_relative_to(found.modules)]
    files = [next(path.rglob("*.py")).relative_to(found.modules) for path in inside]
    assert files  # the interpreter's own tests, at least
    # the folder by which modules are found: another user may not walk to the usual one
    source = (
        f"import sys\ntop = next(p for p in sys.path if p.endswith({Path(found.modules).name!r}))"
    )
    for name in map(str, files):
        outcome = run_script(f"{source}\nopen(f'{{top}}/{name}')")
        assert b"PermissionError" in outcome.stderr
    readable, listed = found.split()
    assert not [path for path in readable for other in hidden if other.is_relative_to(path)]
    assert found.modules in listed
    assert f"{found.modules}/json" in readable


@linux
def test_threads_only_where_they_are_allowed() -> None:
    source = (
        "import threading\nt = threading.Thread(target=print, args=('ran',))\nt.start()\nt.join()"
    )
    assert b"can't start new thread" in run_script(source).stderr
    allowed = Sandbox(kind="lite", processes=4, wall_s=10.0)
    assert run_script(source, allowed).stdout == b"ran\n"


def test_functions_are_called_and_return_data_and_what_they_print_is_no_reply(pool: Pool) -> None:
    def task(fresh, _):
        box = fresh()
        loaded = box.load(
            "def f(a, *, b):\n    print('{}')\n    return (a, b)\n"
            "class S:\n    def m(self): return 1\n"
        )
        pair = box.call(Call(name="f", args=(1,), kwargs={"b": {"$set": [2]}}))
        return loaded, pair, box.call(Call(name="S.m")), box.call(Call(name="g"))

    [(loaded, pair, method, missing)] = pool.map(task, [0])
    assert loaded == Returned(value=None)
    assert pair == Returned(value={"$tuple": [1, {"$set": [2]}]})
    assert method == Returned(value=1)
    assert (missing.error, missing.kind) == ("KeyError", "KeyError")


@linux
def test_every_program_has_a_fresh_box() -> None:
    def task(fresh, _):
        box = fresh()
        box.load("import builtins\nbuiltins.seen = getattr(builtins, 'seen', 0) + 1")
        return box.pid

    pool = Pool(Lite, SETTINGS, 1)
    pids = pool.map(task, range(4))
    pool.close()
    assert len(set(pids)) == 4


@linux
def test_a_spare_box_may_wait_for_longer_than_a_start_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = time.monotonic
    spare = Box(Lite(), SETTINGS, 61_500)
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: clock() + 1000.0)
        spare.wait_ready()
        outcome = spare.script("print(1)", b"")
        spare.close()
    assert (outcome.ended, outcome.stdout) == ("exit", b"1\n")


@linux
def test_only_processes_of_ours_are_killed_and_what_was_said_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kill, killed = os.kill, []

    def watched(pid: int, number: int) -> None:
        killed.append(pid)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", watched)
    monkeypatch.setattr(family, "_children", lambda pid: [pid])  # two numbers to kill
    ended, cut = (Box(Lite(), SETTINGS, 61_500 + n) for n in range(2))
    ended.wait_ready()
    outcome = ended.script("print('x' * 1000)", b"")
    ended.kill()
    ended.close()
    ended.kill()
    assert killed == []  # it had ended by itself
    cut.close()
    assert killed == [cut.pid]  # and then its number was free
    cut.kill()
    assert killed == [cut.pid]
    assert len(outcome.stdout) == 1001
    assert (ended._pipes.said["stdout"], ended._ended.stdout) == (b"", b"")


@linux
def test_closing_ends_boxes_and_the_pool_can_be_used_again() -> None:
    pool = Pool(Lite, SETTINGS, 2)
    assert pool.map(lambda fresh, n: fresh().load(f"x = {n}").value, [1, 2, 3]) == [None] * 3
    waiting = pool.pids()
    assert len(waiting) == 2  # each slot keeps one ready
    pool.close()
    assert [pid for pid in waiting if Path(f"/proc/{pid}").exists()] == []
    assert pool.map(lambda fresh, n: fresh().load("x = 1").value, [1]) == [None]
    pool.close()


PARENT = """
import sys, time
from gruppo.sandbox import Pool, Sandbox
from gruppo.sandbox.choose import choose
kind = sys.argv[1]
settings = Sandbox(kind=kind)
pool = Pool(lambda: choose(settings).backend, settings, 1)
pool.map(lambda fresh, n: fresh().load("x = 1"), [1])
print(*pool.pids(), flush=True)
time.sleep(60)
"""


def descendants(pid: int) -> list[int]:
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(n for child in direct for n in descendants(int(child)))]


@linux
def test_boxes_die_with_the_process_that_made_them() -> None:
    kind = choose(Sandbox()).backend.kind
    with subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        family = descendants(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 10
    while (alive := [n for n in family if is_running(n)]) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(family) >= 1
    assert alive == []


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@linux
def test_a_box_that_does_not_hold_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = Unboxed(
        kind="lite", sealed=True, isolates=True
    )  # it drops nothing, and so its filter alone holds
    monkeypatch.setitem(sys.modules["gruppo.sandbox.choose"]._BACKENDS, "lite", (leaky,))
    with pytest.raises(NoSandbox) as refused:
        find(SETTINGS, print)
    text = str(refused.value)
    assert "a program in it could read a file of the host" in text
    assert "apt-get install bubblewrap" in text
    assert 'kind = "unsafe-none"' in text


@linux
def test_a_missing_bubblewrap_is_refused_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoSandbox, match="bubblewrap is not installed: apt-get install bubblewrap"):
        find(Sandbox(kind="bubblewrap"), print)


@linux
def test_the_lite_box_has_no_folder_to_write_in() -> None:
    with pytest.raises(NoSandbox, match="tmp_mib = 8"):
        find(Sandbox(kind="lite", tmp_mib=8, file_mib=8), print)
