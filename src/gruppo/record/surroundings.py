"""What a run was made with: versions, git commit, platform. It imports no package to ask it."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("gruppo", "torch", "transformers", "safetensors", "peft", "math-verify", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """Commit checked out in ``folder``, ``+changes`` if files differ; None outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "-uno")
    if changes is None:
        return commit + "+unknown"
    return commit + ("+changes" if changes else "")


def describe(folder: Path) -> dict[str, object]:
    """Versions, git commit of ``folder`` and platform as plain JSON values."""
    return {
        "versions": versions(),
        "git": git_commit(folder),
        "platform": platform.platform(),
        "machine": platform.machine(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    # No file system monitor: it is a command that the repository's own settings may choose.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
