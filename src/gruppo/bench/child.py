"""``python -m gruppo.bench.child WORK.json OUTCOME.json``: one measurement in its own process."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from gruppo.bench.measure import measure
from gruppo.bench.work import Work

if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    known = {entry.name for entry in fields(Work)}
    outcome = measure(Work(**{name: task[name] for name in known}), gflops=task["gflops"])
    Path(sys.argv[2]).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
