"""The system call filters, interpreted here as the kernel would: which call is answered how."""

import os
import struct
import subprocess
import sys
from pathlib import Path

from gruppo.sandbox import filter as seccomp
from gruppo.sandbox import syscalls
from support.boxes import linux

pytestmark = linux
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EAGAIN, ENOSYS = ERRNO | 1, ERRNO | 11, ERRNO | 38
LIST = 0x1234_5678_9AB0
ARCH, COLUMN = seccomp._MACHINES[seccomp.machine()]


def answer(program: bytes, name: str, *arguments: int, arch: int = ARCH, add: int = 0) -> int:
    """What the filter returns for a call."""
    number = (syscalls.NUMBERS[name][COLUMN] or 0) + add
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    value = at = 0
    while True:
        code, jump_true, jump_false, operand = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code == 0x15:
            at += jump_true if value == operand else jump_false
        elif code == 0x35:
            at += jump_true if value >= operand else jump_false
        elif code == 0x45:
            at += jump_true if value & operand else jump_false
        elif code == 0x54:
            value &= operand
        else:
            assert code == 0x06
            return operand


def test_the_filter_names_the_machine_first_and_refuses_the_rest() -> None:
    program = seccomp.strict(pid=7, threads=False, files=False)
    assert answer(program, "read") == ALLOW
    assert answer(program, "read", arch=ARCH + 1) == KILL
    assert answer(program, "read", add=0x40000000) == KILL
    refused = ("execve", "execveat", "kill", "memfd_create", "prctl", "mkdirat", "pwrite64")
    assert {answer(program, name) for name in refused} == {EPERM}
    assert answer(program, "read", add=400) == EPERM  # a call that nobody here has named
    assert answer(program, "clone") == EAGAIN
    assert answer(program, "clone3") == ENOSYS


def test_files_and_threads_only_where_they_are_allowed() -> None:
    program = seccomp.strict(pid=7, threads=True, files=True)
    assert answer(program, "mkdirat") == ALLOW
    assert answer(program, "clone", 0x003D0F00) == ALLOW
    assert answer(program, "clone", 17) == EPERM


def test_nothing_is_opened_for_writing_where_nothing_may_be_written() -> None:
    """Not even emptied by a descriptor for reading, which Landlock allows before Linux 6.2."""
    strict, files = (seccomp.strict(pid=7, threads=False, files=on) for on in (False, True))
    read, at = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY, -100 & (1 << 64) - 1
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        assert answer(strict, "openat", at, 1, flags) == EPERM
        assert answer(strict, "openat", at, 1, read | flags) == EPERM
        opened = answer(files, "openat", at, 1, read | flags)
        assert opened == (EPERM if flags == os.O_TRUNC else ALLOW)
    assert answer(strict, "openat", at, 1, read) == answer(strict, "openat", at, 1, 0) == ALLOW
    if COLUMN == 0:  # aarch64 has no such call
        assert answer(strict, "open", 1, os.O_TRUNC) == EPERM
        assert answer(strict, "open", 1, read) == ALLOW


def test_a_file_is_emptied_only_by_who_may_write_it() -> None:
    """Landlock asks for a right to write where a file is opened for that; O_TRUNC alone is not."""
    at = -100 & (1 << 64) - 1
    for program in (seccomp.build(), seccomp.strict(pid=7, threads=False, files=True)):
        for flags, said in (
            (os.O_RDONLY, ALLOW),
            (os.O_WRONLY | os.O_CREAT | os.O_TRUNC, ALLOW),
            (os.O_RDWR | os.O_TRUNC, ALLOW),
            (os.O_TRUNC, EPERM),
            (os.O_TRUNC | os.O_CREAT | os.O_CLOEXEC, EPERM),
            (os.O_TRUNC | os.O_WRONLY | os.O_RDWR, EPERM),  # 3: neither to read nor to write
        ):
            assert answer(program, "openat", at, 1, flags) == said, oct(flags)
            if COLUMN == 0:
                assert answer(program, "open", 1, flags) == said, oct(flags)


EMPTIES = """
import os, sys
from gruppo.sandbox import filter, lockdown
lockdown._prctl(lockdown._PR_SET_NO_NEW_PRIVS, 1)
lockdown.seal(filter.build(), 60, 1 << 20)
for flags in (os.O_RDONLY, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
    try:
        os.close(os.open(sys.argv[1], flags))
    except OSError as error:
        print(error.errno)
    print(os.stat(sys.argv[1]).st_size)
"""


def test_the_kernel_reads_the_filter_so_too(tmp_path: Path) -> None:
    """No Landlock here, as if it were one that does not see what O_TRUNC does."""
    file = tmp_path / "file"
    file.write_text("four")
    command = [sys.executable, "-c", EMPTIES, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "1", "4", "0"]  # allowed, EPERM, allowed and emptied


def test_signals_to_itself_and_harmless_requests_alone() -> None:
    program = seccomp.strict(pid=7, threads=False, files=False)
    assert [answer(program, "tgkill", pid) for pid in (7, 8, -1 & (1 << 64) - 1)] == [
        ALLOW,
        EPERM,
        EPERM,
    ]
    assert [answer(program, "ioctl", 0, what) for what in (0x5401, 0x5412)] == [ALLOW, EPERM]
    assert [answer(program, "fcntl", 0, what) for what in (3, 8, 10)] == [ALLOW, EPERM, EPERM]


def test_a_file_is_executed_with_one_list_of_arguments_only() -> None:
    program = seccomp.strict(pid=7, threads=False, files=False, argv=LIST)
    empty_path = 0x1000
    assert answer(program, "execveat", 9, 1, LIST, 2, empty_path) == ALLOW
    others = (LIST + 16, LIST + (1 << 32), LIST & 0xFFFFFFFF, 0)
    assert {answer(program, "execveat", 9, 1, other, 2, empty_path) for other in others} == {EPERM}
    for flags in (0, 0x100, empty_path | 1 << 32):
        assert answer(program, "execveat", 9, 1, LIST, 2, flags) == EPERM
    assert answer(program, "execve", 1, LIST, 2) == EPERM
    assert answer(program, "read") == ALLOW


def test_a_compiler_may_start_its_tools_and_reach_nobody() -> None:
    program = seccomp.build()
    allowed = ("execve", "wait4", "openat", "unlinkat", "renameat")
    assert {answer(program, name) for name in allowed} == {ALLOW}
    assert [answer(program, "clone", flags) for flags in (0x4111, 0x01200011)] == [ALLOW] * 2
    new_user, new_network = 0x10000011, 0x40000011
    assert {answer(program, "clone", flags) for flags in (new_user, new_network)} == {EPERM}
    refused = ("kill", "tgkill", "prlimit64", "setsid", "prctl", "memfd_create", "seccomp")
    assert {answer(program, name) for name in refused} == {EPERM}
    assert answer(program, "clone3") == ENOSYS
