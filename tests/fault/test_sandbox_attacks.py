"""Hostile programs in every kind of box, as this user and as another: none harms, none is paid."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.attacks import ATTACKS, HARMLESS

CHILD = Path(__file__).parents[1] / "support" / "attack_child.py"
USER = 61_111
PLAIN_PYTHON = "/usr/bin/python3"  # one that an ordinary user can reach

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boxes need Linux")
BOXES = [
    pytest.param(
        "bubblewrap",
        marks=pytest.mark.skipif(
            shutil.which("bwrap") is None, reason="bubblewrap is not installed"
        ),
    ),
    "lite",
]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(PLAIN_PYTHON),
    reason=f"becoming another user needs root, and {PLAIN_PYTHON} for it",
)


def attacked(kind: str, which: str, folder: Path, *, uid: int = 0) -> dict:
    """What the attacks came to, run in a process of their own."""
    folder.chmod(0o777)
    done = subprocess.run(
        [sys.executable, str(CHILD), str(uid), kind, which, PLAIN_PYTHON if uid else "", folder],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)[kind]


def unpaid(values: dict) -> dict:
    """Scores that are neither 0, nor the completion's own failure, nor fairly earned."""
    fair = {attack.name for attack in ATTACKS if attack.earns}
    return {
        name: value
        for name, value in values.items()
        if value != 0.0
        and not (isinstance(value, list) and value[0] == "completion")
        and not (value == 1.0 and name in fair)
    }


def check_survived(result: dict, num_attacks: int) -> None:
    assert len(result["values"]) == num_attacks
    assert unpaid(result["values"]) == {}
    assert result["changed"] == []
    assert result["leftovers"] == []
    assert result["next"] == 1.0


QUICK = sum(not attack.slow for attack in ATTACKS)


@pytest.mark.parametrize("kind", BOXES)
def test_no_attack_is_paid_or_harms(kind: str, tmp_path: Path) -> None:
    result = attacked(kind, "quick", tmp_path)
    check_survived(result, QUICK)
    assert result["values"]["read a file"] == 0.0
    assert result["values"]["fork bomb"] == 1.0  # it also solves the problem
    assert result["values"]["hard exit"] == ["completion", "exit_0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOXES)
def test_attacks_that_run_to_a_limit(kind: str, tmp_path: Path) -> None:
    result = attacked(kind, "slow", tmp_path)
    check_survived(result, len(ATTACKS) - QUICK)
    assert result["values"]["endless loop"] == ["completion", "timeout"]
    assert result["values"]["signals ignored"] == ["completion", "timeout"]


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("which", ["quick", "slow"])
@pytest.mark.parametrize("kind", BOXES)
def test_the_same_as_an_ordinary_user(kind: str, which: str, tmp_path: Path) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o777)
    result = attacked(kind, which, tmp_path, uid=USER)
    check_survived(result, QUICK if which == "quick" else len(ATTACKS) - QUICK)


def test_without_a_box_harmless_attacks_succeed(tmp_path: Path) -> None:
    """These tests can fail: the same programs win, and change the host, where nothing isolates."""
    result = attacked("unsafe-none", "harmless", tmp_path)
    assert set(result["values"]) == set(HARMLESS)
    assert result["values"]["read a file"] == 1.0
    assert result["values"]["append to a file"] == 1.0
    assert "text" in result["changed"]


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
