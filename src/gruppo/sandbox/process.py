"""Inside a box that is a process of the host: what locks it, and jobs that only it can have.

The walls are ``lockdown``'s. Besides the jobs of ``inside`` there are two:

- ``compile``: a compiler makes a file of the program, whose bytes are sent out;
- ``native``: such bytes come in, and this process becomes that program.

This file is loaded inside the box and imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, Final

from gruppo.sandbox import lockdown
from gruppo.sandbox.inside import Channel, prepared, work


def main(commands: int, replies: int, pending: bytes) -> None:
    """Lock this process, take the job and run it."""
    channel = Channel(commands, replies, pending, write=json.dumps, read=json.loads)
    work(channel, drop=_drop, seal=_seal, prepare=_prepare)


def _drop(config: dict[str, Any]) -> None:
    if config["path"] is not None:
        _reopen(config["path"])
    lockdown.drop(config)


def _seal(job: dict[str, Any]) -> None:
    lockdown.seal(bytes.fromhex(job["filter"]), job["cpu_s"], job["file_limit"])


def _prepare(channel: Channel, job: dict[str, Any]) -> Callable[[], None]:
    if job["mode"] == "native":
        return _become(channel, job)
    if job["mode"] == "compile":
        return lambda: _compile(channel, job)
    return prepared(channel, job)


def _reopen(prefix: str) -> None:
    """Reach modules by way of an open folder: the new user may not be able to walk to it."""
    folder = f"/proc/self/fd/{os.open(prefix, os.O_PATH)}"
    packages = [module.__dict__.get("__path__") for module in list(sys.modules.values())]
    for paths in (sys.path, *packages):
        if isinstance(paths, list):
            paths[:] = [folder + p[len(prefix) :] if p.startswith(prefix) else p for p in paths]


def _compile(channel: Channel, job: dict[str, Any]) -> None:
    """Run the compiler in the box's folder; its messages go to the error stream."""
    os.chdir(job["folder"])
    with open(job["file"], "wb") as file:
        file.write(job["source"].encode(errors="surrogatepass"))
    closed = [(os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in channel.descriptors]
    environment = {"PATH": job["search"], "TMPDIR": job["folder"], "LC_ALL": "C"}
    actions = [*closed, (os.POSIX_SPAWN_DUP2, 2, 1)]
    pid = os.posix_spawn(job["argv"][0], job["argv"], environment, file_actions=actions)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = {"code": code, "seconds": used.ru_utime + used.ru_stime}
    if code != 0:
        channel.send({**told, "size": 0})
        return
    with open("program", "rb") as file:
        data = file.read()
    channel.send({**told, "size": len(data)}, data)


def _become(channel: Channel, job: dict[str, Any]) -> Callable[[], None]:
    """Take in a program, and return what makes this process that program.

    Its argument list is put where the host says: the filter allows no other to be used.
    """
    program = _executable_memory()
    for piece in channel.take(job["size"]):
        view = memoryview(piece)
        while view:
            view = view[os.write(program, view) :]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = os.sysconf("SC_PAGE_SIZE")  # 16 and 64 KiB on some ARM64 kernels
    page, flags = job["place"] // size * size, 0x100022  # MAP_FIXED_NOREPLACE, ANONYMOUS, PRIVATE
    if libc.mmap(ctypes.c_void_p(page), ctypes.c_size_t(size), 3, flags, -1, 0) != page:
        raise OSError(ctypes.get_errno(), "no memory at the address drawn")
    name = ctypes.create_string_buffer(b"main")
    arguments = (ctypes.c_char_p * 2).from_address(job["place"])
    arguments[0] = ctypes.cast(name, ctypes.c_char_p)
    nothing = (ctypes.c_char_p * 1)(None)
    number, file, flag = map(ctypes.c_long, (_EXECVEAT[os.uname().machine], program, _EMPTY_PATH))

    def become() -> None:
        channel.close()
        libc.syscall(number, file, ctypes.c_char_p(b""), arguments, nothing, flag)
        os.write(2, f"not executed: {os.strerror(ctypes.get_errno())}".encode())
        os._exit(126)

    return become


def _executable_memory() -> int:
    """A file in memory; newer kernels want to be told that it is to be executed."""
    try:
        return os.memfd_create("program", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:
        return os.memfd_create("program", os.MFD_CLOEXEC)


_MFD_EXEC: Final = 0x10
_EXECVEAT: Final = {"x86_64": 322, "aarch64": 281}
_EMPTY_PATH: Final = 0x1000  # AT_EMPTY_PATH: the file is the open one
