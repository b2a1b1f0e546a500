"""The code reward for C and C++: compiled in one box, run in another."""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gruppo.recipe import load
from gruppo.recipe.build import open_rewards
from gruppo.reward import Code
from gruppo.reward.code_run import Trial, build
from gruppo.reward.code_tests import Streams
from gruppo.sandbox import CPP, Binary, Box, NoSandbox, Outcome, Sandbox, SandboxFailure
from gruppo.sandbox import box as box_module
from gruppo.sandbox import compiled as compiled_module
from gruppo.sandbox.compiled import _won, compile_program, for_compiling, workshop
from gruppo.sandbox.lite import Lite
from gruppo.sandbox.pool import Pool
from gruppo.sandbox.toolchain import find
from gruppo.types import Completion, Problem, Score
from support.boxes import linux

pytestmark = linux
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
BOXES = [
    "lite",
    pytest.param(
        "bubblewrap",
        marks=pytest.mark.skipif(shutil.which("bwrap") is None, reason="it is not installed"),
    ),
]
BOX = Sandbox(kind="lite", cpu_s=1, wall_s=3.0, memory_mib=256)
SQUARE = {"stdin": [{"input": "3\n", "output": "9\n"}, {"input": "-4", "output": "16"}]}


def row(text: str) -> Completion:
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


SQUARED = """#include <stdio.h>
int main() {{ int n; scanf("%d", &n); {} printf("%d\\n", {}); }}"""


@pytest.fixture(scope="module")
def compiled():
    code = Code(sandbox=BOX, language="cpp")
    yield code
    code.close()


@needs_compiler
@pytest.mark.parametrize(
    ("do", "said", "value"),
    [
        ("", "n * n", 1.0),
        ("", "9", 0.5),
        ("return 0;", "n * n", 0.0),
        ("", "n *", ("completion", "compile_error")),
        ("abort();", "n * n", ("completion", "compile_error")),  # undeclared
        ("__builtin_trap();", "n * n", ("completion", "crash")),
        ("for (volatile int i = 0;; i++) {}", "n * n", ("completion", "timeout")),
        ('for (;;) puts("0123456789");', "n * n", ("completion", "oversize")),
    ],
)
def test_compiled_programs_are_judged_by_what_they_print(
    compiled: Code, do: str, said: str, value: object
) -> None:
    problem = Problem(id="p", prompt=(), info={"tests": SQUARE})
    text = f"```cpp\n{SQUARED.format(do, said)}\n```\nprints\n```text\n9\n```"
    [found] = compiled(problem, [row(text)])
    assert ((found.error.fault, found.error.kind) if isinstance(found, Score) else found) == value


REFUSED = r"""#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
int main() {
    int n, own = open("/lib64/ld-linux-x86-64.so.2", O_RDONLY);
    char *const none[] = {nullptr};
    if (scanf("%d", &n) != 1 || open("/etc/passwd", O_RDONLY) >= 0) return 1;
    if (fork() >= 0 || socket(AF_INET, SOCK_STREAM, 0) >= 0) return 2;
    syscall(SYS_execveat, own, "", none, none, AT_EMPTY_PATH);
    execve("/bin/true", none, none);
    printf("%d\n", n * n);
}"""


@needs_compiler
@pytest.mark.parametrize("kind", BOXES)
def test_a_compiled_program_can_start_open_and_reach_nothing(kind: str) -> None:
    code = Code(sandbox=replace(BOX, kind=kind), language="cpp", extract="all")
    values = code(Problem(id="p", prompt=(), info={"tests": SQUARE}), [row(REFUSED)])
    code.close()
    assert values == [1.0]  # it goes on after every refusal


@needs_compiler
def test_a_compilers_words_reach_no_score(compiled: Code) -> None:
    problem = Problem(id="p", prompt=(), info={"tests": SQUARE})
    sources = [
        '#include "/etc/passwd"',
        '#line 1 "/etc/passwd"\n#error "secret"',
        '#error "secret"',
    ]
    values = compiled(problem, [row(f"```c++\n{source}\n```") for source in sources])
    assert [value.error.text for value in values] == ["g++: status 1"] * 3


@needs_compiler
def test_a_box_in_which_nothing_can_be_written_is_no_fault_of_the_program() -> None:
    box = Box(Lite().compiling(find(CPP)), for_compiling(BOX), 61_500)
    box.wait_ready()
    folder = Path(box._folder)
    folder.rmdir()
    with pytest.raises(SandboxFailure, match="no word of the compiler"):
        box.compile(find(CPP), "int main() {}")
    box.close()
    assert folder.name.startswith("gruppo-compile-")


@needs_compiler
def test_nothing_is_left_of_a_compiler_that_is_cut_off() -> None:
    box = Box(Lite().compiling(find(CPP)), replace(for_compiling(BOX), wall_s=0.5), 61_500)
    box.wait_ready()
    outcome = box.compile(find(CPP), ENDLESS)
    folder = Path(box._folder)
    box.close()
    assert isinstance(outcome, Outcome)
    assert outcome.ended == "wall"
    assert not folder.exists()
    # nor a zombie: parents have waited for what was killed
    assert [path for path in Path("/proc").glob("[0-9]*") if group_of(path) == box.pid] == []


SAYS = '#include <cstdio>\nint main() { puts("ran"); }'
ENDLESS = (
    "template<int N, int M> struct A { A<N - 1, M * 2> a; A<N - 1, M * 2 + 1> b; };\n"
    "template<int M> struct A<0, M> {};\nA<25, 0> a;"
)


@needs_compiler
@pytest.mark.parametrize("killed", ["by the kernel", "and then by us"])
def test_nothing_is_left_of_a_compiler_whose_driver_is_killed(killed: str) -> None:
    """As the kernel kills one process where memory is short; then nobody waits for the others."""
    settings = replace(for_compiling(BOX), wall_s=6.0)  # less than the compiler takes
    box = Box(Lite().compiling(find(CPP)), settings, 61_501)
    box.wait_ready()

    def kill() -> None:
        until = time.monotonic() + 30
        while len(alive_in(box.pid)) < 3 and time.monotonic() < until:  # driver, g++, cc1plus
            time.sleep(0.01)
        os.kill(box.pid, signal.SIGKILL)
        if killed != "by the kernel":
            with suppress(ChildProcessError):  # seen already
                os.waitid(os.P_PID, box.pid, os.WEXITED | os.WNOWAIT)
            box.kill()

    other = threading.Thread(target=kill)
    other.start()
    with pytest.raises(SandboxFailure, match="no word of the compiler"):
        box.compile(find(CPP), ENDLESS)
    other.join()
    box.close()
    until = time.monotonic() + 2  # a process that is killed is not gone at once
    while alive_in(box.pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert alive_in(box.pid) == []


def alive_in(group: int) -> list[str]:
    """Processes of a group that are no zombies."""
    found = [path for path in Path("/proc").glob("[0-9]*") if group_of(path) == group]
    return [path.name for path in found if state_of(path) != "Z"]


def state_of(process: Path) -> str:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def group_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2])
    except OSError:
        return 0


@needs_compiler
def test_c_is_a_language_of_its_own() -> None:
    code = Code(sandbox=BOX, language="c")
    problem = Problem(id="p", prompt=(), info={"tests": SQUARE})
    source = SQUARED.format("int class = n;", "class * n")  # no C++
    values = code(problem, [row(f"```{mark}\n{source}\n```") for mark in ("c", "", "cpp")])
    code.close()
    assert values[:2] == [1.0, 1.0]
    assert values[2].error.kind == "no_program"


def test_functions_of_compiled_programs_cannot_be_called(compiled: Code) -> None:
    for tests in ({"function": "f", "cases": [{"args": [], "expected": 1}]}, {"asserts": ["f()"]}):
        [value] = compiled(Problem(id="p", prompt=(), info={"tests": tests}), [row("```\nx\n```")])
        assert (value.error.fault, value.error.kind) == ("grader", "tests_wrong")
        assert 'tests of the form {"stdin": [...]} alone' in value.error.text


def test_a_machine_without_descriptors_is_no_fault_of_a_program() -> None:
    def fresh() -> Box:
        raise OSError(24, "Too many open files")

    trial = Trial(source="int main() {}", suite=Streams(cases=(("", ""),)), fast=False)
    with pytest.raises(SandboxFailure, match="Too many open files"):
        build(fresh, trial, CPP)


def test_a_compilers_box_that_could_not_be_tried_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for one in which the attack failed."""
    answers = [Binary(data=b"x"), SandboxFailure("gone")]
    monkeypatch.setattr(Pool, "map", lambda self, task, items: answers)
    maker = Pool(lambda: pytest.fail("no box is asked for"), Sandbox(), 1)
    with pytest.raises(NoSandbox, match=r"g\+\+ cannot be tried in its box: gone"):
        _won(maker, maker, CPP, tmp_path / "canary")


@needs_compiler
def test_a_workshop_is_tried_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by who never asked for that, as a reward does when it is opened."""
    settings = replace(BOX, memory_mib=300)  # of no other test
    made: list[str] = []
    monkeypatch.setattr(compiled_module, "_won", lambda *_: ["include a file of the host"])
    pool = workshop(settings, 1, CPP)
    with pytest.raises(NoSandbox, match="one could include a file of the host in the lite box"):
        pool.map(lambda fresh, source: made.append(source), ["int main() {}"])
    assert made == []
    monkeypatch.undo()
    [program] = pool.map(lambda fresh, text: compile_program(fresh, CPP, text), ["int main() {}"])
    pool.close()
    assert isinstance(program, Binary)


@needs_compiler
@pytest.mark.parametrize("bits", [36, 39, 42, 47])
def test_a_program_is_started_where_addresses_have_few_bits(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of ARM64 kernels: the list of arguments lies in their lowest half at most."""
    quarter = 1 << bits - 2
    monkeypatch.setattr(box_module, "_free_addresses", lambda: quarter)
    monkeypatch.setattr(box_module.secrets, "randbelow", lambda below: below - 1)
    orders = []
    strict = box_module.seccomp.strict
    monkeypatch.setattr(
        box_module.seccomp, "strict", lambda **given: orders.append(given) or strict(**given)
    )
    maker, runner = Pool(lambda: Lite().compiling(find(CPP)), for_compiling(BOX), 1), None
    try:
        [made] = maker.map(lambda fresh, text: compile_program(fresh, CPP, text), [SAYS])
        runner = Pool(Lite, BOX, 1)
        [outcome] = runner.map(lambda fresh, program: fresh().native(program, b""), [made])
    finally:
        maker.close()
        if runner is not None:
            runner.close()
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exit", 0, b"ran\n")
    assert orders[0]["argv"] == ((1 << 32) + quarter - 1) & ~15
    assert orders[0]["argv"] + 4096 <= 1 << bits - 1


def test_free_addresses_are_a_quarter_of_this_machine_s() -> None:
    stack = Path("/proc/self/maps").read_text().partition("[stack]")[0].splitlines()[-1]
    top = int(stack.partition("-")[0], 16)
    assert 4 * box_module._free_addresses() == 1 << top.bit_length()


def test_another_program_by_a_compilers_name_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of links to ccache comes first in PATH; called by its own name, it does not compile.

    Neither does a script that starts the compiler: a box has no shell.
    """
    real = shutil.which("g++")
    ccache = tmp_path / "ccache"
    ccache.write_text(f'#!/bin/sh\ncase $0 in *g++) exec {real} "$@";; esac\necho usage\nexit 1\n')
    script = tmp_path / "scripts" / "g++"
    links = tmp_path / "links"
    links.mkdir()
    script.parent.mkdir()
    (links / "g++").symlink_to(ccache)
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    for file in (ccache, script):
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{links}:{script.parent}:{os.environ['PATH']}")
    if real is not None:
        tools = find.__wrapped__(CPP)
        assert tools.argv[0] == os.path.realpath(real)
        assert str(tmp_path) not in tools.search
    monkeypatch.setenv("PATH", f"{links}:{script.parent}")
    with pytest.raises(
        NoSandbox, match=r"need g\+\+ itself, and .*links/g\+\+, .*scripts/g\+\+ is"
    ):
        find.__wrapped__(CPP)


def test_a_missing_compiler_is_refused_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    settings = ['reward.parts.0.sandbox={kind = "lite"}', "reward.parts.0.language=cpp"]
    with pytest.raises(ValueError, match=r"g\+\+, which is not installed: apt-get install g\+\+"):
        open_rewards(load("code_tasks", settings), lambda text: None)
