"""Choices between two ways to compute, made by timing both: fairly, and once per machine.

Such a choice changes results by rounding. Timed anew by every process it would come out now so, now
so where the two are close, and two runs of one recipe would part; so the first answer is kept in
the user's cache folder. What is asked, and what follows from the answer, is the caller's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gruppo.cache import cache_folder

_log = logging.getLogger(__name__)


def fastest(works: Sequence[Callable[[], object]], *, repeats: int) -> list[float]:
    """Seconds of the fastest of ``repeats`` calls of each of ``works``, the first call left out.

    They take turns, so that whatever else the machine does for a while hits all of them alike.
    """
    for work in works:
        work()
    found = [float("inf")] * len(works)
    for _ in range(repeats):
        for index, work in enumerate(works):
            started = time.perf_counter()
            work()
            found[index] = min(found[index], time.perf_counter() - started)
    return found


def remembered(
    question: str, among: Sequence[str], measure: Callable[[], str], *, depends_on: Sequence[str]
) -> str:
    """The answer to ``question`` on this machine: the kept one, else that of ``measure``, now kept.

    Two processes that ask at once get one answer. Where the cache folder cannot be written, each
    process measures for itself. Delete ``measured/`` in the cache folder to have all measured anew.

    Args:
        question: what is asked, in a word.
        among: the possible answers; anything else in a file is measured anew.
        measure: finds the answer.
        depends_on: versions and settings that may change it; the processor is always one of them.
    """
    identity = "\0".join((question, *depends_on, processor()))
    name = f"{question}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.txt"
    file = cache_folder() / "measured" / name
    if (kept := _read(file, among)) is not None:
        return kept
    answer = measure()
    try:
        if file.exists() and _read(file, among) is None:  # damaged
            file.unlink(missing_ok=True)
        _keep(file, answer)
    except OSError as error:
        _log.warning("%s is measured anew by every process: %s", question, error)
        return answer
    return _read(file, among) or answer


def processor() -> str:
    """What timings and ``-march=native`` depend on: machines of several kinds may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(known[:2]) or platform.processor() or platform.machine()


def _read(file: Path, among: Sequence[str]) -> str | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text in among else None


def _keep(file: Path, answer: str) -> None:
    """Write it whole or not at all; whoever comes first stays."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        made.write_text(answer + "\n", encoding="utf-8")
        try:
            os.link(made, file)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            with suppress(FileExistsError), file.open("x", encoding="utf-8") as kept:
                kept.write(answer + "\n")
