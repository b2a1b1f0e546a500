"""Which box is used: the first that holds against the mini attacks of ``probe``.

Every choice is tried, once per process, before the first program runs: a box that silently lacks
one of its walls (a container that forbids namespaces, a kernel without Landlock) is refused.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from gruppo.sandbox import interpreter
from gruppo.sandbox.base import (
    Backend,
    Call,
    NoSandbox,
    Outcome,
    Returned,
    Sandbox,
    SandboxFailure,
)
from gruppo.sandbox.box import Box
from gruppo.sandbox.bubblewrap import INSTALL, Bubblewrap
from gruppo.sandbox.lite import Lite, Unboxed
from gruppo.sandbox.pool import FreshBox, Pool
from gruppo.sandbox.python import library
from gruppo.sandbox.wasi import Wasi
from gruppo.wheel import Report

_BACKENDS: Final[dict[str, tuple[Backend, ...]]] = {
    "auto": (Bubblewrap(), Lite(), Wasi()),
    "bubblewrap": (Bubblewrap(),),
    "lite": (Lite(),),
    "wasi": (Wasi(),),
    "unsafe-none": (Unboxed(),),
}
_FIXES: Final = {
    "bubblewrap": (
        "as an ordinary user it needs user namespaces: Ubuntu 24.04 wants an AppArmor profile for "
        "bwrap (or sysctl kernel.apparmor_restrict_unprivileged_userns=0), Docker a seccomp "
        "profile that allows them; as root it needs CAP_SYS_ADMIN"
    ),
    "lite": "it needs Linux 5.13 or newer with Landlock enabled (lsm=landlock,...)",
    "wasi": f"it needs what {interpreter.INSTALL} gives",
}
_HINTS: Final = {
    "read a file of the host": "files are not isolated",
    "write a file of the host": "files are not isolated",
    "read installed packages": "files are not isolated",
    "make a file": "a folder of the host can be written to",
    "change the mode of a file": "seccomp is not in force",
    "open a kernel setting for writing": "it runs as the host's root",
    "connect to the host": "the network is not isolated",
    "start a process": "seccomp is not in force",
    "signal the host": "process ids or seccomp are not isolated",
    "trace a process": "seccomp is not in force",
    "become root": "rights were kept",
    "make a user namespace": "seccomp is not in force",
    "make a file in memory": "seccomp is not in force",
    "raise a limit": "limits are not in force",
    "take twice the memory": "limits are not in force",
    "read an environment": "processes are not isolated",
}
_ADVICE: Final = {
    "linux": f"bubblewrap: {INSTALL}",
    "darwin": f"wasmtime: {interpreter.INSTALL}",
}
_LAST_RESORT: Final = (
    'Programs are not run without a box, unless the recipe says sandbox = { kind = "unsafe-none" }'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend to use, and what to tell about it: why others were not taken, if any."""

    backend: Backend
    text: str


_chosen: dict[Sandbox, Choice] = {}


def choose(settings: Sandbox, report: Report = lambda text: None) -> Choice:
    """The backend for ``settings.kind``, tried; ``report`` is told of downloads.

    Raises:
        NoSandbox: none holds here; the text names what failed, and the fix.
    """
    if settings not in _chosen:
        _chosen[settings] = find(settings, report)
    return _chosen[settings]


def find(settings: Sandbox, report: Report) -> Choice:
    """``choose``, tried anew."""
    refusals: list[str] = []
    for backend in _possible(settings.kind):
        if not backend.isolates:
            return Choice(
                backend=backend,
                text="programs run with NO SANDBOX, with all rights of this process",
            )
        refusal = _refusal(backend, settings, report)
        if refusal is None:
            user = "a user of its own" if os.geteuid() == 0 else "this user"
            text = "; ".join([f"programs run in the {backend.kind} box as {user}", *refusals])
            return Choice(backend=backend, text=text)
        refusals.append(f"{backend.kind}: {refusal}")
    raise NoSandbox(
        f'sandbox.kind = "{settings.kind}": no box holds here. {". ".join(refusals)}. Install '
        f"{_ADVICE[sys.platform]}. {_LAST_RESORT}"
    )


def _possible(kind: str) -> tuple[Backend, ...]:
    """The backends of a kind that there are on this system.

    Raises:
        NoSandbox: there are none.
    """
    backends = _BACKENDS[kind]
    if sys.platform == "darwin":
        backends = tuple(backend for backend in backends if backend.kind == "wasi")
    if sys.platform not in _ADVICE or not backends:
        raise NoSandbox(
            f'sandbox.kind = "{kind}": this box needs Linux, and this is {sys.platform}; run in a '
            'Linux container or virtual machine (on macOS, kind = "wasi" runs Python programs)'
        )
    return backends


@cache
def boxes(settings: Sandbox, workers: int) -> Pool:
    """The one pool of these settings: records that are equal share their boxes.

    The backend is chosen when the first box is needed; ``map`` raises NoSandbox if none holds.
    """
    return Pool(lambda: choose(settings).backend, settings, workers)


def _refusal(backend: Backend, settings: Sandbox, report: Report) -> str | None:
    """Why a backend cannot be used; None if it can."""
    quick = replace(settings, cpu_s=max(settings.cpu_s, 5), wall_s=60.0, output_mib=1)
    pool = Pool(lambda: backend, quick, 1)
    try:
        backend.prepare(quick, report)
        won = pool.map(partial(_attack, own=backend.sealed), [quick])[0]
    except NoSandbox as error:
        return str(error)
    finally:
        pool.close()
    fix = _FIXES[backend.kind]
    if isinstance(won, SandboxFailure):
        return f"{won} ({fix})"
    if won:
        told = ", ".join(f"{name} ({_HINTS.get(name, '')})" for name in won)
        return f"refused, because a program in it could {told} ({fix})"
    return None


def _attack(fresh: FreshBox, settings: Sandbox, *, own: bool) -> list[str]:
    """Run the mini attacks in a box, with things of the host to go for.

    ``own``: the interpreter in the box is one of the host, and has all that the attacks need.
    """
    box = fresh()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        canary = Path(folder, "canary")
        canary.write_text("canary")
        canary.chmod(0o666)
        facts = {
            "canary": str(canary),
            "port": server.getsockname()[1],
            "pids": [os.getpid()],
            "hidden": library(settings.interpreter).hidden,
            "folders": [folder, "/tmp/", "/dev/shm", "/var/tmp", "/run", "/", str(Path.home())],
            "token": secrets.token_hex(8),
            "memory": settings.memory_mib << 20,
            "own": own,
        }
        if settings.tmp_mib:  # its own, and it may write there
            facts["folders"] = [path for path in facts["folders"] if path != "/tmp/"]
        return _won(box, facts)


def _won(box: Box, facts: dict[str, Any]) -> list[str]:
    loaded = box.load(Path(__file__).with_name("probe.py").read_text(encoding="utf-8"))
    result = box.call(Call(name="attack", args=(facts,))) if _is_value(loaded) else loaded
    if (
        isinstance(result, Outcome)
        or result.error is not None
        or not isinstance(result.value, list)
    ):
        raise SandboxFailure(f"the mini attacks could not be run: {result}"[:300])
    return [str(name) for name in result.value]


def _is_value(result: Outcome | Returned) -> bool:
    return isinstance(result, Returned) and result.error is None
