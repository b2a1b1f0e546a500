"""Memory that really runs out: an address space too small for the first micro-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOTAL = 300 * 4 * (3 + 64)
"""Tokens of all rows: prompts of 3, four completions of 64 to each."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and read on Linux")
def test_a_process_that_runs_out_of_memory_goes_on_with_less(tiny_folder: Path):
    child = Path(__file__).with_name("memory_child.py")
    left = 60 * 2**20  # what a quarter of the rows would need
    ran = subprocess.run(
        [sys.executable, str(child), str(tiny_folder), str(left)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "2",  # each has room of its own
            "PYTHONPATH": os.pathsep.join([str(child.parents[1]), *sys.path]),
        },
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["unlimited"] is None
    assert TOTAL // 32 < found["limit"] <= TOTAL // 2
    (said,) = found["said"]
    assert said.startswith("out of memory: going on with train.tokens_per_microbatch = ")
    assert found["apart"] < 1e-4  # float32, added up in another order
