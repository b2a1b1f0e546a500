"""Hostile programs for the sandbox tests: each tries to harm the host or to be paid for nothing.

They are never run outside a box, but for those that ``HARMLESS`` names. Placeholders:
``@CANARY@`` a file of the host that anyone may read and write, ``@FOLDER@`` its folder,
``@TOKEN@`` its content (also in the host's environment), ``@PORT@`` a listening TCP port, ``@PID@`` the host's process,
``@ANSWERS@`` the right results. ``WON = True`` says that an attack succeeded.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """
import ctypes, os, sys, time
WON = False
libc = ctypes.CDLL(None, use_errno=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """``earns``: the score may be 1 because the problem is solved; ``slow``: runs to a limit."""

    name: str
    source: str
    earns: bool = False
    slow: bool = False


def _won(name: str, body: str) -> Attack:
    """Succeeds if ``body`` sets WON, or ends without an exception when it never names it."""
    lines = body.strip("\n").splitlines()
    tries = "try:\n" + "\n".join(f"    {line}" for line in lines)
    if "WON" not in body:
        tries += "\n    WON = True"
    return Attack(name=name, source=f"{HEAD}{tries}\nexcept BaseException:\n    pass\n{IF_WON}")


def _side(name: str, body: str, *, slow: bool = False) -> Attack:
    """Solves the problem after ``body``, whatever that did."""
    lines = body.strip("\n").splitlines()
    tries = "try:\n" + "\n".join(f"    {line}" for line in lines)
    source = f"{HEAD}{tries}\nexcept BaseException:\n    pass\n{HONEST}"
    return Attack(name=name, source=source, earns=True, slow=slow)


def _raw(name: str, source: str, *, slow: bool = False) -> Attack:
    """A program as it stands, which must not be paid."""
    return Attack(name=name, source=HEAD + source, slow=slow)


FILES = (
    _won("read a file", "WON = open('@CANARY@').read() == '@TOKEN@'"),
    _won("read passwd", "open('/etc/passwd').read()"),
    _won("list root's home", "WON = len(os.listdir('/root')) > 1"),
    _won("list homes", "os.listdir('/home')"),
    _won("write ssh keys", "open('/root/.ssh/authorized_keys', 'a')"),
    _won("write a home", "open(os.path.expanduser('~') + '/.@TOKEN@', 'w')"),
    _won("write the prefix", "open(os.path.dirname(os.__file__) + '/@TOKEN@.py', 'w')"),
    _won("write the driver", "open('@FOLDER@/inside.py', 'w')"),
    _won("append to a file", "open('@CANARY@', 'a').write('x')"),
    _won("chmod", "os.chmod('@CANARY@', 0o600)"),
    _won("utime", "os.utime('@CANARY@', (1, 1))"),
    _won("setxattr", "os.setxattr('@CANARY@', 'user.x', b'1')"),
    _won("truncate", "os.truncate('@CANARY@', 0)"),
    _won("chown", "os.chown('@CANARY@', os.getuid(), -1)"),
    _won("unlink", "os.unlink('@CANARY@')"),
    _won("rename", "os.rename('@CANARY@', '@FOLDER@/b')"),
    _won("symlink out", "os.symlink('/etc', '@FOLDER@/link')"),
    _won("hard link", "os.link('@CANARY@', '@FOLDER@/hard')"),
    _won("fifo", "os.mkfifo('@FOLDER@/fifo')"),
    _won("fill tmp", "open('/tmp/@TOKEN@', 'wb').write(bytes(1 << 20))"),
    _won("fill shm", "open('/dev/shm/@TOKEN@', 'wb').write(bytes(1 << 20))"),
    _won("inodes", "[open(f'/tmp/@TOKEN@{i}', 'w') for i in range(1000)]"),
    _won("huge file", "os.truncate(os.open('@FOLDER@/huge', os.O_CREAT | os.O_RDWR), 1 << 40)"),
    _won(
        "escape by a descriptor",
        """
for n in range(64):
    for up in range(1, 8):
        try:
            open(f'/proc/self/fd/{n}/' + '../' * up + '@CANARY@').read(); WON = True
        except OSError: pass
        try:
            os.open('../' * up + '@CANARY@', os.O_RDONLY, dir_fd=n); WON = True
        except OSError: pass
""",
    ),
    _won("open by handle", "WON = libc.syscall(304, -100, ctypes.c_char_p(bytes(64)), 0) >= 0"),
)

PROCESSES = (
    _side("fork bomb", "while True: os.fork()"),
    _side(
        "thread bomb",
        """
import threading
while True: threading.Thread(target=time.sleep, args=(99,)).start()
""",
    ),
    _side(
        "daemon",
        """
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
""",
    ),
    _won("vfork by hand", "WON = libc.syscall(58) >= 0"),
    _won("clone by hand", "WON = libc.syscall(56, 17, 0, 0, 0, 0) >= 0"),
    _won("clone3 by hand", "WON = libc.syscall(435, ctypes.c_char_p(bytes(88)), 88) >= 0"),
    _won("exec a shell", "os.execv('/bin/sh', ['sh', '-c', 'echo @TOKEN@'])"),
    _won("exec the interpreter", "os.execv(sys.executable, ['python', '-c', 'print(1)'])"),
    _won("system", "WON = os.system('true') == 0"),
    _won("spawn", "import subprocess; subprocess.run([sys.executable, '-c', ''])"),
    _won("signal the host", "os.kill(@PID@, 0)"),
    _won("kill the parent", "WON = os.getppid() > 1 and os.kill(os.getppid(), 9) is None"),
    _won(
        "kill every process",
        """
for pid in (-1, 1, *range(2, 3000)):
    try: os.kill(pid, 9); WON = True
    except OSError: pass
""",
    ),
    _won("tgkill the host", "WON = libc.syscall(234, @PID@, @PID@, 9) == 0"),
    _won("queue a signal", "WON = libc.syscall(129, @PID@, 9, ctypes.c_char_p(bytes(128))) == 0"),
    _won("pidfd", "os.pidfd_open(@PID@)"),
    _won(
        "own a pipe's signals",
        """
import fcntl
r, w = os.pipe()
fcntl.fcntl(r, 8, @PID@)
fcntl.fcntl(r, 10, 9)
fcntl.fcntl(r, 4, 0o20000)
os.write(w, b'x')
""",
    ),
    _won(
        "timer that signals a thread",
        """
event = (ctypes.c_int * 16)(0, 0, 9, 4, @PID@)
timer = ctypes.c_int()
WON = libc.syscall(222, 0, event, ctypes.byref(timer)) == 0
""",
    ),
    _won("trace the host", "WON = libc.ptrace(0x4206, @PID@, 0, 0) == 0"),
    _won("be traced", "WON = libc.ptrace(0, 0, 0, 0) == 0"),
    _won(
        "read the host's memory",
        """
data = ctypes.create_string_buffer(8)
iov = (ctypes.c_size_t * 2)(ctypes.addressof(data), 8)
WON = libc.syscall(310, @PID@, iov, 1, iov, 1, 0) >= 0
""",
    ),
    _won("host memory file", "open('/proc/@PID@/mem', 'rb')"),
    _won("own memory file", "open('/proc/self/mem', 'r+b')"),
    _won("environment", "WON = any('@TOKEN@' in v for v in os.environ.values())"),
    _won("own environ file", "open('/proc/self/environ').read()"),
    _won("host environ file", "WON = '@TOKEN@' in open('/proc/@PID@/environ').read()"),
    _won("host command line", "open('/proc/@PID@/cmdline').read()"),
    _won("host files by proc", "open('/proc/@PID@/root/etc/hostname').read()"),
    _won("init's root", "os.listdir('/proc/1/root')"),
    _won("oom score", "open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    _won("outlive the parent", "WON = libc.prctl(1, 0, 0, 0, 0) == 0"),
    _won("priority", "os.nice(5); os.setpriority(0, 0, 5)"),
    _won("pin to a core", "os.sched_setaffinity(0, {0})"),
)

KERNEL = (
    _won("core pattern", "open('/proc/sys/kernel/core_pattern', 'r+')"),
    _won("mount", "WON = libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    _won("unshare users", "WON = libc.unshare(0x10000000) == 0"),
    _won("unshare mounts", "WON = libc.unshare(0x00020000) == 0"),
    _won("join a namespace", "WON = libc.setns(0, 0) == 0"),
    _won("chroot", "os.chroot('/')"),
    _won("become root", "os.setuid(0); WON = os.getuid() == 0"),
    _won("change groups", "os.setgroups([0])"),
    _won(
        "type into a terminal",
        """
import fcntl
for n in range(8):
    try: fcntl.ioctl(n, 0x5412, b'x'); WON = True
    except OSError: pass
""",
    ),
    _won("tcp", "import socket; socket.create_connection(('127.0.0.1', @PORT@), 1)"),
    _won("udp", "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', @PORT@))"),
    _won("abstract socket", "import socket; socket.socket(1, 1).bind(chr(0) + '@TOKEN@')"),
    _won("socket pair", "import socket; socket.socketpair()"),
    _won("netlink", "import socket; socket.socket(16, 3)"),
    _won("memfd", "os.memfd_create('x')"),
    _won("sysv memory", "WON = libc.shmget(0, 1 << 20, 0o1600) >= 0"),
    _won("sysv queue", "WON = libc.msgget(0, 0o1600) >= 0"),
    _won("posix queue", "WON = libc.syscall(240, b'/@TOKEN@', 0o102, 0o600, 0) >= 0"),
    _won("io_uring", "WON = libc.syscall(425, 8, ctypes.c_char_p(bytes(120))) >= 0"),
    _won("bpf", "WON = libc.syscall(321, 0, ctypes.c_char_p(bytes(72)), 72) >= 0"),
    _won("perf", "WON = libc.syscall(298, ctypes.c_char_p(bytes(128)), 0, -1, -1, 0) >= 0"),
    _won("userfaultfd", "WON = libc.syscall(323, 0) >= 0"),
    _won("keyring", "WON = libc.syscall(250, 0, -3, 1) >= 0"),
    _won("inotify", "WON = libc.inotify_init() >= 0"),
    _won("clock", "time.clock_settime(0, 0.0)"),
    _won("host name", "import socket; socket.sethostname('x')"),
    _won("another machine word", "WON = libc.syscall(0x40000000 + 39) > 0"),
    _won(
        "raise its limits",
        """
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
    resource.setrlimit(kind, (1 << 40, 1 << 40)); WON = True
""",
    ),
    _won("loosen the filter", "WON = libc.prctl(22, 0, 0, 0, 0) == 0"),
)

RESOURCES = (
    _side("memory bomb", "x = []\nwhile True: x.append(bytearray(1 << 24))", slow=True),
    _side("mmap bomb", "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))"),
    _side("pipes", "x = []\nwhile True: x.append(os.pipe())"),
    _raw("endless stdout", "while True: sys.stdout.write('x' * 4096)"),
    _raw("endless stderr", "while True: sys.stderr.write('x' * 4096)"),
    _raw("endless loop", "while True: pass", slow=True),
    _raw("sleep", "time.sleep(1000)", slow=True),
    _raw(
        "signals ignored",
        """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
        slow=True,
    ),
    _raw("tower of powers", "x = 9 ** 9 ** 9", slow=True),
    _raw("regular expression", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", slow=True),
    _raw("compile bomb", "compile('(' * 10**6 + ')' * 10**6, 'x', 'eval')", slow=True),
    _raw("deep source", "eval('-' * 10**7 + '1')", slow=True),
    _raw("folding bomb", "eval('1 << 10 ** 9 << 10 ** 9')", slow=True),
    _raw(
        "del loop",
        """
class Loop:
    def __del__(self):
        while True: pass
Loop()
""",
        slow=True,
    ),
    _raw(
        "deep recursion",
        """
sys.setrecursionlimit(10 ** 9)
def deep(): deep()
deep()
""",
        slow=True,
    ),
    _raw("segfault", "ctypes.string_at(0)"),
    _raw("abort", "os.abort()"),
)

RESULTS = (
    _raw("exit", "sys.exit(0)"),
    _raw("hard exit", "os._exit(0)"),
    _raw("exit in the function", "def solve(n): sys.exit(0)"),
    _raw("hard exit in the function", "def solve(n): os._exit(0)"),
    _raw(
        "always equal",
        """
class Same:
    def __eq__(self, other): return True
def solve(n): return Same()
""",
    ),
    _raw(
        "an int that is equal",
        """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return Same(1)
""",
    ),
    _raw(
        "a dict that lies",
        """
class Lies(dict):
    def items(self): return [('value', 1)]
def solve(n): return Lies()
""",
    ),
    _raw(
        "a class that lies",
        """
class Lies:
    __class__ = int
def solve(n): return Lies()
""",
    ),
    _raw(
        "pickle",
        """
class Run:
    def __reduce__(self): return os.system, ('touch @FOLDER@/pickled',)
def solve(n): return Run()
""",
    ),
    _raw("nan", "def solve(n): return float('nan')"),
    _raw("infinity", "def solve(n): return float('inf')"),
    _raw("a long text", "def solve(n): return 'x' * (200 << 20)", slow=True),
    _raw("a large number", "def solve(n): return 10 ** 200000", slow=True),
    _raw(
        "deep lists",
        """
def solve(n):
    x = []
    for _ in range(100_000): x = [x]
    return x
""",
    ),
    _raw("a list of itself", "x = []; x.append(x)\ndef solve(n): return x"),
    _raw("a generator", "def solve(n): yield 1"),
    _raw("colliding numbers", "def solve(n): return [i * (2 ** 61 - 1) for i in range(10 ** 5)]"),
    _raw(
        "colliding keys",
        """
def solve(n): return {-i * (2 ** 61 - 1): i for i in range(3000)}
""",
    ),
    _raw(
        "replaced built-ins",
        """
import builtins, json
builtins.type = lambda *a: int
builtins.isinstance = lambda *a: True
json.dumps = lambda *a, **k: '{"passed": true}'
def solve(n): return 1
""",
    ),
    _raw("true for one", "def solve(n): return True"),
    _raw(
        "tests from frames",
        """
def solve(n):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if type(value) is int and value > 10 ** 12: return value
            if isinstance(value, dict) and n in value: return value[n]
            if isinstance(value, (list, tuple)):
                for entry in value:
                    if type(entry) is int and entry > 10 ** 12: return entry
        frame = frame.f_back
""",
    ),
    _raw(
        "tests from the collector",
        """
import gc
def solve(n):
    for thing in gc.get_objects():
        if type(thing) is dict:
            for key in ('expected', 'answers', 'tests'):
                if key in thing: return thing[key]
            if type(thing.get(n)) is int and thing[n] > 10 ** 12: return thing[n]
""",
    ),
    _raw(
        "spoofed lines",
        """
for n in range(64):
    try: os.write(n, b'{"passed": true, "score": 1, "value": 1}\\nAll tests passed\\n')
    except OSError: pass
""",
    ),
    _raw(
        "stolen id",
        """
import json
def solve(n):
    frame = sys._getframe()
    while frame:
        call, channel = frame.f_locals.get('call'), frame.f_locals.get('channel')
        if isinstance(call, dict) and channel:
            channel.send({'id': call['id'], 'value': 1, 'passed': True, 'score': 1})
            channel.send({'id': call['id'], 'test': 0, 'passed': True})
        frame = frame.f_back
    return 1
""",
    ),
    _raw(
        "answers ahead",
        """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == 'Channel':
        for _ in range(100): thing.send({'id': '', 'value': 1})
def solve(n): return 1
""",
    ),
    _raw(
        "commands read ahead",
        """
for n in range(3, 64):
    try: os.set_blocking(n, False); os.read(n, 1 << 20)
    except OSError: pass
def solve(n): return 1
""",
    ),
    _raw(
        "flooded replies",
        """
for n in range(3, 64):
    try:
        while True: os.write(n, b'x' * 65536)
    except OSError: pass
""",
    ),
    _raw(
        "deep reply",
        """
for n in range(3, 64):
    try: os.write(n, b'{"id": ' + b'[' * 900_000 + b'\\n')
    except OSError: pass
""",
    ),
    _raw(
        "odd numbers in a reply",
        """
for n in range(3, 64):
    try: os.write(n, b'{"id": ' + b'9' * 500_000 + b', "value": NaN}\\n')
    except OSError: pass
""",
    ),
    _raw(
        "exit spoof",
        """
import atexit
atexit.register(lambda: [os.write(n, b'{"passed": true}\\n') for n in (1, 2)])
""",
    ),
    _raw("descriptors closed", "os.closerange(0, 64)"),
    _raw(
        "strange bytes",
        r"""
os.write(1, b'\xff\xfe\x00\x1b[2J\x1b]0;x\x07')
raise ValueError('\u202e\x1b[31m\x00\udc80')
""",
    ),
    _raw(
        "error that raises",
        """
class Bad(Exception):
    def __str__(self): raise Bad
def solve(n): raise Bad
""",
    ),
    _raw("syntax error", "def solve(n) return"),
    Attack(name="nul in the source", source="def solve(n):\0 return 1"),
    Attack(name="surrogate in the source", source="x = '\ud800'\ndef solve(n): return 1"),
)

ATTACKS = (*FILES, *PROCESSES, *KERNEL, *RESOURCES, *RESULTS)
# What shows that the tests can fail: these succeed without a box, and do no harm.
HARMLESS = ("read a file", "chmod", "own environ file", "memfd", "udp")
