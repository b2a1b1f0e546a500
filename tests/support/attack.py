"""What a hostile program is, and the three ways to write one.

Placeholders in programs: ``@CANARY@`` a file of the host that anyone may read and write,
``@FOLDER@`` its folder, ``@DRIVER@`` the host's file of the driver in the box, ``@TOKEN@`` the
canary's content (also in the host's environment), ``@PORT@`` a listening TCP port, ``@PID@`` the
host's process, ``@ANSWERS@`` the right results. ``WON = True`` says that an attack succeeded.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """
import os, sys, time
WON = False
try:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
except ImportError:  # Python for WASI: what needs it fails where it is used
    pass
"""
# paid only if the attack succeeded
IF_WON = """
def solve(n):
    return @ANSWERS@[n] if WON else -1
"""
# solves the problem as well: being paid is fair, harming is not
HONEST = """
def solve(n):
    return @ANSWERS@[n]
"""


# of each program; attacks on a compiler meet that one's
LIMITS = {"cpu_s": 1, "wall_s": 2.5, "memory_mib": 256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """``earns``: the score may be 1 because the problem is solved; ``slow``: runs to a limit."""

    name: str
    source: str
    earns: bool = False
    slow: bool = False


def won(name: str, body: str) -> Attack:
    """Succeeds if ``body`` sets WON, or ends without an exception when it never names it."""
    lines = body.strip("\n").splitlines()
    tries = "try:\n" + "\n".join(f"    {line}" for line in lines)
    if "WON" not in body:
        tries += "\n    WON = True"
    return Attack(name=name, source=f"{HEAD}{tries}\nexcept BaseException:\n    pass\n{IF_WON}")


def side(name: str, body: str, *, slow: bool = False) -> Attack:
    """Solves the problem after ``body``, whatever that did."""
    lines = body.strip("\n").splitlines()
    tries = "try:\n" + "\n".join(f"    {line}" for line in lines)
    source = f"{HEAD}{tries}\nexcept BaseException:\n    pass\n{HONEST}"
    return Attack(name=name, source=source, earns=True, slow=slow)


def raw(name: str, source: str, *, slow: bool = False) -> Attack:
    """A program as it stands, which must not be paid."""
    return Attack(name=name, source=HEAD + source, slow=slow)
