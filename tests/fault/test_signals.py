"""SIGINT and SIGTERM at twenty moments of a run: saved, ended in order, nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("signals_child.py")
MOMENTS = 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signals_at_twenty_moments(tiny_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tiny_folder), str(tmp_path), str(MOMENTS)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(CHILD.parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == MOMENTS
    stopped = [line for line in lines if "all steps done" not in line["log"]]
    assert len(stopped) > MOMENTS / 2
    for line in lines:
        assert line["left"] == [], line
        assert line["strange"] == [], line
        assert "Traceback" not in line["log"], line
        assert line["seconds"] < 10, line  # without those in which this machine let no one run
    for line in stopped:
        assert line["code"] == {2: 130, 15: 143}[line["signal"]], line
        assert line["saved"] == line["last"], line  # the last finished step
    assert len({line["last"] for line in stopped}) > 5  # early and late in the run
