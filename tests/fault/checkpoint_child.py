"""Saves and prunes checkpoints in children that die, or fail, at a chosen file system call.

Run by test_checkpoint_faults.py: ``python checkpoint_child.py <how> <folder> <work>...``; how is
"hooks" (die at the n-th audited call, from inside) or "strace" (have the kernel's tracer do it).
Prints one JSON line per walked point. A process of its own, because pytest's must not fork.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

import gruppo

# A bare package in place of gruppo.policy, whose own imports (transformers) take seconds.
bare = types.ModuleType("gruppo.policy")
bare.__path__ = [str(Path(gruppo.__file__).parent / "policy")]
sys.modules["gruppo.policy"] = bare
from gruppo.policy import checkpoint  # noqa: E402 (after the line above)

CALLS = ("openat", "write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir", "close")
ERRORS = {
    "openat": ("EMFILE", "EROFS", "EIO"),
    "write": ("ENOSPC", "EIO"),
    "fsync": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EIO", "EROFS"),
    "mkdir": ("ENOSPC", "EMFILE", "EROFS"),
}


def write(value: float) -> Callable[[Path], None]:
    def files(folder: Path) -> None:
        checkpoint.write_tensors(folder / "model.safetensors", {"w": torch.full((50,), value)})
        checkpoint.write_json(folder / "state.json", {"value": value})
        (folder / "sub").mkdir()
        with (folder / "sub" / "notes.txt").open("w") as stream:
            stream.write("half")
            stream.flush()
            stream.write(f" and {value}")

    return files


def value_of(path: Path) -> float:
    """The value a checkpoint was written with; all its files must agree."""
    value = checkpoint.read_json(path / "state.json")["value"]
    assert checkpoint.read_tensors(path / "model.safetensors")["w"].tolist() == [value] * 50
    assert (path / "sub" / "notes.txt").read_text() == f"half and {value}"
    return value


WORK: dict[str, Callable[[Path], object]] = {
    "save": lambda folder: checkpoint.save(folder, write(2.0), step=2),
    "replace": lambda folder: checkpoint.save(folder, write(2.0), step=1),
    "prune": lambda folder: checkpoint.prune(folder, 1),
}


def prepare(folder: Path, work: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save(folder, write(1.0), step=1)
    if work == "prune":
        checkpoint.save(folder, write(2.0), step=2)


def report(folder: Path, **more: object) -> None:
    """What a run that starts now would find, and whether it can go on saving."""
    told = folder.with_name("error.json")
    error = json.loads(told.read_text()) if told.exists() else None
    told.unlink(missing_ok=True)
    path, damaged = checkpoint.latest(folder)
    found = None if path is None else value_of(path)
    checkpoint.save(folder, write(3.0), step=3)
    after = value_of(checkpoint.latest(folder)[0])
    names = sorted(entry.name for entry in folder.iterdir())
    line = {"found": found, "damaged": damaged, "after": after, "names": names, "error": error}
    print(json.dumps({**more, **line}), flush=True)


def die_at(point: int) -> None:
    """Kill this process before its ``point``-th file system call."""
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), 9)

    def hook(event: str, _: object) -> None:
        if event == "open" or event.startswith("os."):
            step()

    fsync = os.fsync
    os.fsync = lambda handle: (step(), fsync(handle), step())  # type: ignore[assignment]
    sys.addaudithook(hook)


def fork(folder: Path, run: Callable[[], object]) -> int:
    """Run in a child, which exits 0; 3 on an OSError and 1 on another, written to error.json."""
    child = os.fork()
    if child:
        return child
    try:
        run()
    except BaseException as error:
        told = [type(error).__name__, str(error)]
        folder.with_name("error.json").write_text(json.dumps(told))
        os._exit(3 if isinstance(error, OSError) else 1)
    os._exit(0)


def walk_hooks(work: str, folder: Path) -> None:
    point = 0
    while True:
        point += 1
        prepare(folder, work)

        def run(point: int = point) -> None:
            die_at(point)
            WORK[work](folder)

        status = os.waitstatus_to_exitcode(os.waitpid(fork(folder, run), 0)[1])
        report(folder, work=work, point=point, effect="signal=KILL", status=status, hit=True)
        if status == 0:
            return


def traced(work: str, folder: Path, *options: str) -> int:
    """Run ``work`` in a child under strace with ``options``; returns the child's exit code."""
    ready, go = os.pipe()

    def run() -> None:
        os.read(ready, 1)
        WORK[work](folder)

    child = fork(folder, run)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(child), *options], stderr=subprocess.PIPE, text=True
    )
    select.select([tracer.stderr], [], [], 10)
    first = tracer.stderr.readline()
    assert "attached" in first, first
    os.write(go, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.communicate()
    os.close(ready)
    os.close(go)
    return status


def walk_strace(work: str, folder: Path) -> None:
    log = folder.with_name("strace.log")
    prepare(folder, work)
    traced(work, folder, "-o", str(log), "-e", "trace=" + ",".join(CALLS))
    text = log.read_text()
    for call in CALLS:
        for n in range(1, text.count(f" {call}(") + 1):
            for effect in ("signal=KILL", *(f"error={name}" for name in ERRORS.get(call, ()))):
                prepare(folder, work)
                inject = f"inject={call}:{effect}:when={n}"
                options = ("-o", str(log), "-e", f"trace={call}", "-e", inject)
                status = traced(work, folder, *options)
                hit = "INJECTED" in log.read_text() or status == -9
                report(
                    folder, work=work, point=f"{call} {n}", effect=effect, status=status, hit=hit
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    walks = {"hooks": walk_hooks, "strace": walk_strace}
    for name in sys.argv[3:]:
        walks[sys.argv[1]](name, Path(sys.argv[2]))
