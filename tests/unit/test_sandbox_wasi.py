"""The WASI box: scores as elsewhere, limits, refusals, and whose machine code it runs."""

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gruppo.reward import Code
from gruppo.sandbox import Box, NoSandbox, Pool, Sandbox, choose, interpreter
from gruppo.sandbox.calls import Calls, Ended
from gruppo.sandbox.choose import find
from gruppo.sandbox.interpreter import check_private
from gruppo.sandbox.wasi import Wasi
from gruppo.types import Completion, Problem, Score
from support.boxes import needs_wasi, opened, script

SETTINGS = Sandbox(kind="wasi", cpu_s=1, wall_s=60.0, memory_mib=128)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with opened(Wasi, SETTINGS) as made:
        yield made


@needs_wasi
def test_limits_end_programs(pool: Pool) -> None:
    began = time.process_time()
    endless = script(pool, "while True: pass")
    assert (endless.ended, endless.code) == ("cpu", 9)
    assert time.process_time() - began < 1.0  # it was another process that computed
    held = script(pool, "x = []\nwhile True: x.append(bytearray(1 << 20)); print(len(x))")
    assert held.stderr.endswith(b"MemoryError\n")
    assert 60 < int(held.stdout.split()[-1]) < 128  # MiB, besides the interpreter's own
    assert script(pool, "print('x' * (2 << 20))").ended == "output"
    assert script(pool, "import os\nos.abort()").ended == "signal"


@needs_wasi
def test_a_sleeping_program_is_ended_by_the_clock() -> None:
    box = Box(Wasi(), Sandbox(kind="wasi", wall_s=0.5), 61_500)
    box.wait_ready()
    assert box.script("import time\ntime.sleep(100)", b"").ended == "wall"
    box.close()


@needs_wasi
def test_nothing_of_the_host_is_there(pool: Pool) -> None:
    source = """
import os
print(dict(os.environ))
for action in (lambda: open("/etc/passwd"), lambda: os.listdir("/"), lambda: os.mkdir("x"),
               lambda: open("/tmp/x", "w"), lambda: os.read(3, 1), lambda: os.read(5, 1),
               lambda: __import__("socket").create_connection(("127.0.0.1", 80))):
    try:
        print("won", action())
    except (OSError, AttributeError):
        pass
for name in ("fork", "execv", "kill", "socket", "setuid"):
    print(hasattr(os, name))
"""
    assert script(pool, source).stdout.split() == [b"{}", *[b"False"] * 5]


def score(reward: Code, tests: object, source: str) -> float | str:
    problem = Problem(id="x", prompt=(), info={"tests": tests})
    row = Completion(tokens=(), logp=(), mask=(), version=(), text=source, finish="stop")
    [value] = reward(problem, [row])
    if isinstance(value, Score):
        assert value.error is not None
        return f"{value.error.fault} {value.error.kind}"
    return value


STREAMS = {"stdin": [{"input": "2 3\n", "output": "5\n"}, {"input": "4 4\n", "output": "8\n"}]}
FUNCTION = {
    "function": "add",
    "cases": [{"args": [2, 3], "expected": 5}, {"args": [0, 0], "expected": 0}],
}
ASSERTS = {
    "asserts": ["assert add(2, 3) == 5", "assert add('a', 'b') == 'ab'"],
    "setup": "import math",
}


@needs_wasi
@pytest.mark.parametrize(
    ("tests", "source"),
    [
        (STREAMS, "a, b = map(int, input().split())\nprint(a + b)"),
        (STREAMS, "a, b = map(int, input().split())\nprint(5)"),
        (STREAMS, "print(1 / 0)"),
        (FUNCTION, "def add(a, b):\n    return a + b"),
        (FUNCTION, "def add(a, b):\n    return 5"),
        (FUNCTION, "def add(a, b):\n    return float(a + b)"),
        (FUNCTION, "import os\nos._exit(0)"),
        (FUNCTION, "def add(a, b"),
        (ASSERTS, "def add(a, b):\n    return a + b"),
        (ASSERTS, "def add(a, b):\n    return int(a) + b"),
    ],
)
def test_scores_are_those_of_the_default_box(tests: object, source: str) -> None:
    values = []
    for kind in ("auto", "wasi"):
        reward = Code(sandbox=Sandbox(kind=kind, cpu_s=5, memory_mib=256), extract="all", workers=1)
        values.append(score(reward, tests, source))
        reward.close()
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("setting", "value"), [("tmp_mib", 8), ("processes", 2), ("python", "/usr/bin/python3")]
)
def test_settings_that_it_cannot_follow_are_refused_by_name(setting: str, value: object) -> None:
    settings = Sandbox(**{"kind": "wasi", "file_mib": 8, setting: value})
    with pytest.raises(NoSandbox, match=rf'sandbox\.{setting} = .*the "wasi" box has'):
        find(settings, print)


def test_compiled_languages_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r'code\.language = "cpp" with sandbox\.kind = "wasi"'):
        Code(language="cpp", sandbox=Sandbox(kind="wasi"))


def test_a_missing_wasmtime_is_refused_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(interpreter, "runtime", interpreter.runtime.__wrapped__)
    with pytest.raises(NoSandbox, match=r"wasmtime is not installed: pip install 'gruppo\[wasi\]'"):
        find(Sandbox(kind="wasi"), print)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something in the place of machine code, in a cache of its own."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "cache" / "sandbox" / "python.cwasm"
    file.parent.mkdir(parents=True, mode=0o700)
    file.write_bytes(b"code")
    for place in (file.parent.parent, tmp_path):
        place.chmod(0o755)
    file.chmod(0o644)
    check_private(file)
    return file


@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_machine_code_that_others_can_change_is_not_run(code: Path, mode: int, level: int) -> None:
    place = [code, *code.parents][level]
    place.chmod(place.stat().st_mode | mode)
    with pytest.raises(NoSandbox, match=f"others can write {place}: chmod go-w"):
        check_private(code)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_machine_code_of_another_user_is_not_run(code: Path) -> None:
    os.chown(code, 61_111, 61_111)
    with pytest.raises(NoSandbox, match=f"others can write {code}"):
        check_private(code)


@needs_wasi
def test_machine_code_that_is_cut_off_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = interpreter.prepared()
    assert found is not None
    folder = tmp_path / "sandbox" / found.parent.name
    folder.mkdir(parents=True)
    for place in (tmp_path, folder.parent, folder):
        place.chmod(0o755)
    shutil.copyfile(found.parent / "python.wasm", folder / "python.wasm")
    (folder / found.name).write_bytes(found.read_bytes()[:1000])
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    said: list[str] = []
    assert interpreter.prepare(said.append) == folder / found.name
    assert said == ["Python for WASI: compiling to machine code (once)"]
    assert stat.S_IMODE((folder / found.name).stat().st_mode) == 0o600
    (folder / "python.wasm").write_bytes(b"another")
    (folder / found.name).write_bytes(b"")
    with pytest.raises(NoSandbox, match="was changed; delete"):
        interpreter.prepare(said.append)


@needs_wasi
def test_the_box_holds_against_the_mini_attacks() -> None:
    assert "programs run in the wasi box" in choose(SETTINGS, print).text


class Memory:
    """Stands for a guest's memory of 64 KiB, with wasmtime's ways: slices that may be short."""

    def __init__(self) -> None:
        self.data = bytearray(1 << 16)

    def read(self, store: object, start: int, stop: int) -> bytearray:
        return self.data[start:stop]

    def write(self, store: object, value: bytes, start: int) -> None:
        if start + len(value) > len(self.data):
            raise IndexError("index out of range")
        self.data[start : start + len(value)] = value


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("fd_write", (2, 65_530, 1, 0)),
        ("fd_write", (2, -8, 1, 0)),
        ("fd_read", (0, 0, 1, -1)),
        ("random_get", (65_000, 1000)),
        ("random_get", (0, -1)),
        ("clock_time_get", (0, 0, 65_533)),
        ("args_get", (65_534, 0)),
        ("poll_oneoff", (65_500, 0, 1, 0)),
    ],
)
def test_addresses_outside_of_the_guest_end_it(name: str, numbers: tuple[int, ...]) -> None:
    memory = Memory()
    memory.data[:8] = (8).to_bytes(4, "little") + (4).to_bytes(4, "little")
    calls = Calls(-1, -1, pending=b"more", arguments=["a"], seal=lambda: None)
    calls.bind(None, memory)
    with pytest.raises(IndexError):
        calls.functions()[name](*numbers)


def test_other_descriptors_are_not_open_and_exit_ends() -> None:
    calls = Calls(-1, -1, pending=b"", arguments=[], seal=lambda: None)
    functions = calls.functions()
    assert [functions["fd_read"](number, 0, 1, 8) for number in (3, 4, -1, 1 << 20)] == [8] * 4
    assert [functions["fd_write"](number, 0, 1, 8) for number in (3, 4, -1)] == [8] * 3
    assert functions["fd_prestat_get"](3, 0) == 8
    assert "path_open" not in functions
    with pytest.raises(Ended) as ended:
        functions["proc_exit"](7)
    assert ended.value.status == 7
