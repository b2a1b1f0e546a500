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
from functools import cache
from pathlib import Path
from typing import Any, Final

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

_BACKENDS: Final[dict[str, tuple[Backend, ...]]] = {
    "auto": (Bubblewrap(), Lite()),
    "bubblewrap": (Bubblewrap(),),
    "lite": (Lite(),),
    "unsafe-none": (Unboxed(),),
}
_FIXES: Final = {
    "bubblewrap": (
        "as an ordinary user it needs user namespaces: Ubuntu 24.04 wants an AppArmor profile for "
        "bwrap (or sysctl kernel.apparmor_restrict_unprivileged_userns=0), Docker a seccomp "
        "profile that allows them; as root it needs CAP_SYS_ADMIN"
    ),
    "lite": "it needs Linux 5.13 or newer with Landlock enabled (lsm=landlock,...)",
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
_LAST_RESORT: Final = (
    'Programs are not run without a box, unless the recipe says sandbox = { kind = "unsafe-none" }'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend to use, and what to tell about it: why others were not taken, if any."""

    backend: Backend
    text: str


@cache
def choose(settings: Sandbox) -> Choice:
    """The backend for ``settings.kind``, tried.

    Raises:
        NoSandbox: none holds here; the text names what failed, and the fix.
    """
    if sys.platform != "linux":
        raise NoSandbox(
            f'sandbox.kind = "{settings.kind}": boxes need Linux, and this is {sys.platform}; '
            "run in a Linux container or virtual machine"
        )
    refusals: list[str] = []
    for backend in _BACKENDS[settings.kind]:
        if not backend.sealed:
            return Choice(
                backend=backend,
                text="programs run with NO SANDBOX, with all rights of this process",
            )
        refusal = _refusal(backend, settings)
        if refusal is None:
            user = "a user of its own" if os.geteuid() == 0 else "this user"
            text = "; ".join([f"programs run in the {backend.kind} box as {user}", *refusals])
            return Choice(backend=backend, text=text)
        refusals.append(f"{backend.kind}: {refusal}")
    raise NoSandbox(
        f'sandbox.kind = "{settings.kind}": no box holds here. {". ".join(refusals)}. Install '
        f"bubblewrap: {INSTALL}. {_LAST_RESORT}"
    )


@cache
def boxes(settings: Sandbox, workers: int) -> Pool:
    """The one pool of these settings: records that are equal share their boxes.

    The backend is chosen when the first box is needed; ``map`` raises NoSandbox if none holds.
    """
    return Pool(lambda: choose(settings).backend, settings, workers)


def _refusal(backend: Backend, settings: Sandbox) -> str | None:
    """Why a backend cannot be used; None if it can."""
    quick = replace(settings, cpu_s=max(settings.cpu_s, 5), wall_s=60.0, output_mib=1)
    pool = Pool(lambda: backend, quick, 1)
    try:
        won = pool.map(_attack, [quick])[0]
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


def _attack(fresh: FreshBox, settings: Sandbox) -> list[str]:
    """Run the mini attacks in a box, with things of the host to go for."""
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
