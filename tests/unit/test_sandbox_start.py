"""What a box loads before a program runs: little, because every program waits for it."""

import ast
import json
import math
from collections.abc import Callable

import pytest

from gruppo.sandbox import Box, Sandbox, bundle, guest
from gruppo.sandbox.base import Backend
from gruppo.sandbox.lite import Lite
from gruppo.sandbox.wasi import Wasi
from support.boxes import linux, needs_wasi

SLOW = ("ast", "typing")
PACKAGES = ("contextlib", "enum", "functools", "json", "re")


@pytest.mark.parametrize(
    ("backend", "absent"),
    [
        pytest.param(Lite, SLOW, marks=linux),
        pytest.param(Wasi, (*SLOW, *PACKAGES), marks=needs_wasi),
    ],
)
@pytest.mark.parametrize("job", [Box.script, Box.load])
def test_slow_modules_are_not_loaded_before_the_program(
    backend: Callable[[], Backend], absent: tuple[str, ...], job: Callable[..., object]
) -> None:
    box = Box(backend(), Sandbox(kind=backend().kind, cpu_s=5, wall_s=60.0), 61_500)
    box.wait_ready()
    source = f"import sys\nfound = [n for n in {absent} if n in sys.modules]\n"
    source += (
        "import collections, json, typing, ast\nassert json.loads(json.dumps([1.5])) == [1.5]\n"
    )
    source += "assert typing.get_args(typing.Optional[int])[0] is int and ast.parse('1')\n"
    source += "assert collections.abc.Mapping\n"  # which not every Python loads with collections
    if job is Box.script:
        assert box.script(f"{source}print(found)", b"").stdout == b"[]\n"
    else:
        assert box.load(f"{source}assert found == [], found").error is None
    box.close()


def evaluated(tree: ast.Module) -> set[str]:
    """Names that are used outside of annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def imported(tree: ast.Module) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.name for node in nodes for name in node.names}


@pytest.mark.parametrize("names", [bundle.PROCESS, bundle.GUEST, bundle.RUNNER])
def test_what_is_not_imported_in_a_box_is_used_in_annotations_alone(names: tuple[str, ...]) -> None:
    left_out: dict[str, set[str]] = {}
    for name, text in bundle._texts(names):
        whole = ast.parse((bundle._FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        left_out[name] = imported(whole) - imported(ast.parse(text))
        assert left_out[name] & evaluated(whole) == set()
    called = {"calls", "runner"}  # these have classes that are ``final``
    assert left_out == {name: set() if name in called else {"Any", "Final"} for name in names}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"ready": 42, "sealed": True, "error": None},
        {"value": {"$tuple": [1, -2.5, 1e300, 0.1, [], {"a": False}]}, "id": "x" * 300},
        {"text": 'é\ud800"\\\n\x00\u2028😀', "é": 2**53 - 1},
        {"args": [float("inf"), float("-inf")]},
    ],
)
def test_a_guest_writes_and_reads_json_as_the_package_does(message: dict) -> None:
    line = json.dumps(message)
    assert guest.write(message) == line
    assert guest.read(line.encode()) == json.loads(line)
    (nan,) = guest.read(b'{"a": [NaN]}')["a"]
    assert math.isnan(nan)


def test_a_guest_sends_nothing_that_json_lacks() -> None:
    with pytest.raises(TypeError, match="JSON has no set"):
        guest.write({"value": {1}})
