"""Runs hostile programs through the code reward in a process of its own, and reports as JSON.

``python attack_child.py UID JOBS PYTHON FOLDER``: as user UID (0: as it is); a job is a kind of
box, a colon and "quick", "slow" or "harmless" (joined by commas), with "cpp-" before it for those
in C++; PYTHON interprets the programs ("": the default).
Limits are set around all of it, so that an escape would meet them.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gruppo.reward
from gruppo.reward import Code, code
from gruppo.sandbox import Sandbox, inside
from gruppo.sandbox.bundle import BOOT
from gruppo.types import Completion, Problem, Score

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.attack import HONEST, LIMITS, Attack
from support.attacks import ATTACKS, HARMLESS
from support.attacks_compiled import COMPILED, COMPILED_HARMLESS
from support.attacks_compiled import HONEST as HONEST_COMPILED

SOURCE = "main.cpp"
ANSWERS = {3: 10**12 + secrets.randbelow(10**12), 5: 10**12 + secrets.randbelow(10**12)}


def limit() -> None:
    """Bounds for this process and all it starts."""
    for kind, value in (
        (resource.RLIMIT_FSIZE, 64 << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, 16 << 30),
        (resource.RLIMIT_NPROC, 1000),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def chosen(which: str) -> list[Attack]:
    compiled, _, rest = which.rpartition("-")
    attacks, harmless = (COMPILED, COMPILED_HARMLESS) if compiled else (ATTACKS, HARMLESS)
    if rest == "harmless":
        return [attack for attack in attacks if attack.name in harmless]
    return [attack for attack in attacks if attack.slow == (rest == "slow")]


def written(reward: Code) -> tuple[str, str]:
    """An honest program, and the right results, in the reward's language."""
    if reward.language == "python":
        return HONEST, repr(ANSWERS)
    answers = "".join(f"if (n == {n}) return {value}LL; " for n, value in ANSWERS.items())
    return HONEST_COMPILED, answers


def tests(reward: Code) -> dict[str, Any]:
    if reward.language == "python":
        cases = [{"args": [n], "expected": answer} for n, answer in ANSWERS.items()]
        return {"function": "solve", "cases": cases}
    return {"stdin": [{"input": f"{n}\n", "output": f"{a}\n"} for n, a in ANSWERS.items()]}


def score(reward: Code, sources: list[str]) -> list[Any]:
    """Scores, or (fault, kind) of a failure."""
    problem = Problem(id="x", prompt=(), info={"tests": tests(reward)})
    rows = [
        Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")
        for text in sources
    ]
    values = reward(problem, rows)
    return [
        [value.error.fault, value.error.kind] if isinstance(value, Score) and value.error else value
        for value in values
    ]


def timed(reward: Code, sources: list[str]) -> tuple[list[Any], list[dict[str, float]]]:
    """Scores of programs one after another, and what each took.

    On the clock: to compile it ("build") and to "run" it, the starts of boxes included. In
    processor time: all of it, where its processes were waited for.
    """
    values, times = [], []
    for source in sources:
        took = {"build": 0.0, "run": 0.0}
        before = processor()
        with ExitStack() as stack:
            for name in took:
                stack.enter_context(patch.object(code, name, watched(name, took)))
            values += score(reward, [source])
        times.append({**took, "processor": processor() - before})
    return values, times


def watched(name: str, took: dict[str, float]) -> Callable[..., Any]:
    """The step ``name`` of the reward, which adds the seconds that it takes."""
    step = vars(code)[name]

    def call(*arguments: Any) -> Any:
        began = time.monotonic()
        try:
            return step(*arguments)
        finally:
            took[name] += time.monotonic() - began

    return call


def processor() -> float:
    """Processor seconds of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(name: str) -> int:
    """MiB of memory that this process has ("VmRSS") or had at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(f"{name}:"))


def leftovers() -> list[str]:
    """Processes of boxes that still run, or wait to be waited for, after two seconds."""
    until = time.monotonic() + 2
    while (found := running()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def running() -> list[str]:
    """Processes of boxes that are ours, or nobody's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        ours = int(parent) in (1, os.getpid())
        ours_by_name = BOOT[:60] in command or command.startswith("main\0") or SOURCE in command
        if ours and (ours_by_name or (state == "Z" and int(parent) != 1)):
            found.append(f"{folder.name} {state} {command[:80]}")
    return found


def host_state(folder: Path, token: str) -> dict[str, Any]:
    """What must not change."""
    canary = folder / "canary"
    status = canary.stat()
    scratch = [
        path for top in ("/tmp", "/dev/shm", "/var/tmp") for path in Path(top).glob(f"*{token}*")
    ]
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "text": canary.read_text(),
        "status": [status.st_mode, status.st_uid, status.st_mtime_ns, status.st_nlink],
        "attributes": os.listxattr(canary),
        "scratch": [str(path) for path in scratch],
        "core_pattern": Path("/proc/sys/kernel/core_pattern").read_text(),
    }


def attack_all(kind: str, which: str, python: str, folder: Path) -> dict[str, Any]:
    token = f"t{secrets.token_hex(8)}"
    os.environ["GRUPPO_TEST_SECRET"] = token
    os.environ["HOME"] = str(folder)
    (folder / "canary").write_text(token)
    os.chmod(folder / "canary", 0o666)
    if kind == "wasi" and python:  # it has one for programs; this one runs wasmtime
        sys.executable, python = python, ""
    sandbox = Sandbox(kind=kind, python=python, **LIMITS)
    tempfile.tempdir = str(folder)  # what is left there shows
    language = "cpp" if which.startswith("cpp-") else "python"
    reward = Code(sandbox=sandbox, extract="all", language=language)
    honest, answers = written(reward)
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = {
            "@CANARY@": str(folder / "canary"),
            "@FOLDER@": str(folder),
            "@DRIVER@": str(inside.__file__),
            "@TOKEN@": token,
            "@PORT@": str(server.getsockname()[1]),
            "@PID@": str(os.getpid()),
            "@ANSWERS@": answers,
        }

        def filled(text: str) -> str:
            for name, value in facts.items():
                text = text.replace(name, value)
            return text

        attacks = chosen(which)
        before = host_state(folder, token)
        honest = filled(honest)
        score(reward, [honest])  # the box is chosen and tried
        _, [own] = timed(reward, [honest])
        before_mib = memory("VmRSS")
        sources = [filled(attack.source) for attack in attacks]
        if which.endswith("slow"):
            values, times = timed(reward, sources)
        else:  # side by side
            values, times = score(reward, sources), []
        grown = memory("VmHWM") - before_mib
        next_value = score(reward, [honest])[0]
        reward.close()
        return {
            "values": {a.name: v for a, v in zip(attacks, values, strict=True)},
            "changed": [k for k, v in host_state(folder, token).items() if v != before[k]],
            "next": next_value,
            "leftovers": leftovers(),
            "times": times,
            "own": own,
            "grown_mib": grown,
        }


def main() -> None:
    uid, jobs, python, folder = sys.argv[1:]
    limit()
    if int(uid):
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    results = {}
    for job in jobs.split(","):
        kind, _, which = job.partition(":")
        place = Path(folder, job.replace(":", "-"))
        place.mkdir(mode=0o777)
        place.chmod(0o777)
        results[kind] = attack_all(kind, which, python, place)
    print(json.dumps(results))


if __name__ == "__main__":
    assert gruppo.reward.KINDS["code"] is Code
    main()
