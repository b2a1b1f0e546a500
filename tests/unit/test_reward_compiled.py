"""The code reward for C and C++: compiled in one box, run in another."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gruppo.recipe import load
from gruppo.recipe.build import open_rewards
from gruppo.reward import Code
from gruppo.reward.code_run import Trial, build
from gruppo.reward.code_tests import Streams
from gruppo.sandbox import CPP, Binary, Box, NoSandbox, Outcome, Sandbox, SandboxFailure
from gruppo.sandbox.compiled import _won, for_compiling
from gruppo.sandbox.lite import Lite
from gruppo.sandbox.pool import Pool
from gruppo.sandbox.toolchain import find
from gruppo.types import Completion, Problem, Score

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boxes need Linux")
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
    endless = (
        "template<int N, int M> struct A { A<N - 1, M * 2> a; A<N - 1, M * 2 + 1> b; };\n"
        "template<int M> struct A<0, M> {};\nA<25, 0> a;"
    )
    outcome = box.compile(find(CPP), endless)
    folder = Path(box._folder)
    box.close()
    assert isinstance(outcome, Outcome)
    assert outcome.ended == "wall"
    assert not folder.exists()
    # nor a zombie: parents have waited for what was killed
    assert [path for path in Path("/proc").glob("[0-9]*") if group_of(path) == box.pid] == []


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


def test_a_missing_compiler_is_refused_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    settings = ['reward.parts.0.sandbox={kind = "lite"}', "reward.parts.0.language=cpp"]
    with pytest.raises(ValueError, match=r"g\+\+, which is not installed: apt-get install g\+\+"):
        open_rewards(load("code_tasks", settings), lambda text: None)
