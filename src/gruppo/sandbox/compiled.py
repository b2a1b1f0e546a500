"""Programs in compiled languages: compiled in one box, run in another.

The first box has the compiler, a folder of its own to write in, and lets it start its tools; the
second is the one in which all programs run. What passes between them are bytes. As with every box,
walls are tried before they are trusted (``try_out``).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

from gruppo.sandbox.base import Backend, Binary, NoSandbox, Outcome, Sandbox, SandboxFailure
from gruppo.sandbox.choose import choose
from gruppo.sandbox.pool import FreshBox, Pool
from gruppo.sandbox.toolchain import Toolchain, find

# What a compiler gets, whatever the programs get: several times what the heaviest honest program
# takes (all of C++'s standard headers: two seconds, 300 MiB, a program of 2 MiB).
_SECONDS, _WALL_S, _MEMORY_MIB, _FILE_MIB, _TMP_MIB, _PROCESSES = 10, 60.0, 1024, 16, 64, 16

# Mini attacks of a compiled program; each line of output is one that succeeded.
_PROBE: Final = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {
    char *nothing[] = {0};
    pid_t child = fork();
    if (child == 0) _exit(0);
    if (child > 0) puts("start a process");
    if (open("@CANARY@", O_RDONLY) >= 0) puts("read a file of the host");
    if (open("@CANARY@.new", O_CREAT | O_WRONLY, 0600) >= 0) puts("make a file");
    if (socket(AF_INET, SOCK_STREAM, 0) >= 0) puts("connect to the host");
    if (kill(@PID@, 0) == 0) puts("signal the host");
    if (memfd_create("probe", 0) >= 0) puts("make a file in memory");
    fflush(stdout);
    execve("/bin/true", nothing, nothing);
    execve("/usr/bin/true", nothing, nothing);
    puts("tried");
    return 0;
}
"""


def for_compiling(settings: Sandbox) -> Sandbox:
    """The limits of a compiler's box."""
    return replace(
        settings,
        cpu_s=_SECONDS,
        wall_s=_WALL_S,
        memory_mib=_MEMORY_MIB,
        file_mib=_FILE_MIB,
        tmp_mib=_TMP_MIB,
        processes=_PROCESSES,
    )


@cache
def workshop(settings: Sandbox, workers: int, chain: Toolchain) -> Pool:
    """The one pool of boxes in which ``chain`` compiles, for programs run under ``settings``.

    They are tried when the first is needed; ``map`` raises NoSandbox if they do not hold.
    """

    def backend() -> Backend:
        try_out(settings, chain)
        return choose(settings).backend.compiling(find(chain))

    return Pool(backend, for_compiling(settings), workers)


def compile_program(fresh: FreshBox, chain: Toolchain, source: str) -> Binary | Outcome:
    """Compile a program in a fresh box of ``workshop``; where that fails, how."""
    return fresh().compile(find(chain), source)


@cache
def try_out(settings: Sandbox, chain: Toolchain) -> str:
    """Compile a program that attacks, and run it; what to tell of the compiler.

    Raises:
        NoSandbox: the compiler is missing or does not work here, or an attack succeeded.
    """
    chosen = choose(settings)
    tools = find(chain)
    told = f"{chain.language} is compiled by {tools.argv[0]}"
    if not chosen.backend.isolates:
        return told
    maker = Pool(lambda: chosen.backend.compiling(tools), for_compiling(settings), 1)
    runner = Pool(lambda: chosen.backend, replace(settings, cpu_s=max(5, settings.cpu_s)), 1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)  # the walls are tried, not this folder's mode
            canary = Path(folder, "canary")
            canary.write_text("static int canary;\n")
            canary.chmod(0o666)
            won = _won(maker, runner, chain, canary)
    finally:
        maker.close()
        runner.close()
    if won:
        raise NoSandbox(
            f"sandbox: {chain.language} programs are refused, because one could {', '.join(won)} "
            f"in the {chosen.backend.kind} box"
        )
    return f"{told}, in a box of its own"


def _won(maker: Pool, runner: Pool, chain: Toolchain, canary: Path) -> list[str]:
    probe = _PROBE.replace("@CANARY@", str(canary)).replace("@PID@", str(os.getpid()))
    peek = f'#include "{canary}"\nint main(void) {{ return canary; }}\n'
    made, peeked = maker.map(
        lambda fresh, source: compile_program(fresh, chain, source), [probe, peek]
    )
    if not isinstance(made, Binary):
        raise NoSandbox(
            f"sandbox: {chain.program} compiles nothing in its box ({_about(made)}). It must be "
            f"able to link statically: {chain.install}"
        )
    if isinstance(peeked, Binary):
        return ["include a file of the host"]
    if isinstance(peeked, SandboxFailure):  # nothing was tried
        raise NoSandbox(f"sandbox: {chain.program} cannot be tried in its box: {peeked}")
    [outcome] = runner.map(lambda fresh, program: fresh().native(program, b""), [made])
    if isinstance(outcome, SandboxFailure) or (outcome.ended, outcome.code) != ("exit", 0):
        raise NoSandbox(f"sandbox: no {chain.language} program runs in the box: {_about(outcome)}")
    lines = outcome.stdout.decode(errors="replace").splitlines()
    return lines[:-1] if lines[-1:] == ["tried"] else [*lines, "start another program"]


def _about(result: Outcome | SandboxFailure) -> str:
    """What went wrong with a program of our own: it may be told whole."""
    if isinstance(result, SandboxFailure):
        return str(result)
    said = result.stderr.decode(errors="replace").strip()
    return f"{result.ended} {result.text} {said[-300:]}".strip()
