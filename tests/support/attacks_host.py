"""Attacks on the host: its files, its processes, its kernel."""

from support.attack import side, won

FILES = (
    won("read a file", "WON = open('@CANARY@').read() == '@TOKEN@'"),
    won("read passwd", "open('/etc/passwd').read()"),
    won("list root's home", "WON = len(os.listdir('/root')) > 1"),
    won("list homes", "os.listdir('/home')"),
    won("write ssh keys", "open('/root/.ssh/authorized_keys', 'a')"),
    won("write a home", "open(os.path.expanduser('~') + '/.@TOKEN@', 'w')"),
    won("write the prefix", "open(os.path.dirname(os.__file__) + '/@TOKEN@.py', 'w')"),
    won(
        "write the driver",
        """
paths = {'@DRIVER@', sys.executable, *sys.argv, *sys.orig_argv}
for module in list(sys.modules.values()):
    paths |= {getattr(module, name, None) for name in ('__file__', '__cached__')}
frame = sys._getframe()
while frame:
    paths.add(frame.f_code.co_filename)
    frame = frame.f_back
try: paths |= set(open('/proc/self/cmdline').read().split(chr(0)))
except OSError: pass
for path in paths:
    for name in (path, '/proc/self/fd/3/' + str(path), '/proc/self/cwd/' + str(path)):
        try:  # the same byte again: nothing changes where this succeeds
            file = open(name, 'r+b', buffering=0)
            byte = file.read(1)
            file.seek(0)
            WON = file.write(byte) == 1 or WON
        except (OSError, TypeError, ValueError): pass
""",
    ),
    won("append to a file", "open('@CANARY@', 'a').write('x')"),
    # Python for WASI says that it changed modes, also of files that are not there
    won("chmod", "os.chmod('@CANARY@', 0o600)\nos.stat('@CANARY@')"),
    won("utime", "os.utime('@CANARY@', (1, 1))"),
    won("setxattr", "os.setxattr('@CANARY@', 'user.x', b'1')"),
    won("truncate", "os.truncate('@CANARY@', 0)"),
    won("chown", "os.chown('@CANARY@', os.getuid(), -1)"),
    won("unlink", "os.unlink('@CANARY@')"),
    won("rename", "os.rename('@CANARY@', '@FOLDER@/b')"),
    won("symlink out", "os.symlink('/etc', '@FOLDER@/link')"),
    won("hard link", "os.link('@CANARY@', '@FOLDER@/hard')"),
    won("fifo", "os.mkfifo('@FOLDER@/fifo')"),
    won("fill tmp", "open('/tmp/@TOKEN@', 'wb').write(bytes(1 << 20))"),
    won("fill shm", "open('/dev/shm/@TOKEN@', 'wb').write(bytes(1 << 20))"),
    won("inodes", "[open(f'/tmp/@TOKEN@{i}', 'w') for i in range(1000)]"),
    won("huge file", "os.truncate(os.open('@FOLDER@/huge', os.O_CREAT | os.O_RDWR), 1 << 40)"),
    won(
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
    won("open by handle", "WON = libc.syscall(304, -100, ctypes.c_char_p(bytes(64)), 0) >= 0"),
)

PROCESSES = (
    side("fork bomb", "while True: os.fork()"),
    side(
        "thread bomb",
        """
import threading
while True: threading.Thread(target=time.sleep, args=(99,)).start()
""",
    ),
    side(
        "daemon",
        """
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
""",
    ),
    won("vfork by hand", "WON = libc.syscall(58) >= 0"),
    won("clone by hand", "WON = libc.syscall(56, 17, 0, 0, 0, 0) >= 0"),
    won("clone3 by hand", "WON = libc.syscall(435, ctypes.c_char_p(bytes(88)), 88) >= 0"),
    won("exec a shell", "os.execv('/bin/sh', ['sh', '-c', 'echo @TOKEN@'])"),
    won("exec the interpreter", "os.execv(sys.executable, ['python', '-c', 'print(1)'])"),
    won("system", "WON = os.system('true') == 0"),
    won("spawn", "import subprocess; subprocess.run([sys.executable, '-c', ''])"),
    won("signal the host", "os.kill(@PID@, 0)"),
    won("kill the parent", "WON = os.getppid() > 1 and os.kill(os.getppid(), 9) is None"),
    won(
        "kill every process",
        """
for pid in (-1, 1, *range(2, 3000)):
    try: os.kill(pid, 9); WON = True
    except OSError: pass
""",
    ),
    won("tgkill the host", "WON = libc.syscall(234, @PID@, @PID@, 9) == 0"),
    won("queue a signal", "WON = libc.syscall(129, @PID@, 9, ctypes.c_char_p(bytes(128))) == 0"),
    won("pidfd", "os.pidfd_open(@PID@)"),
    won(
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
    won(
        "timer that signals a thread",
        """
event = (ctypes.c_int * 16)(0, 0, 9, 4, @PID@)
timer = ctypes.c_int()
WON = libc.syscall(222, 0, event, ctypes.byref(timer)) == 0
""",
    ),
    won("trace the host", "WON = libc.ptrace(0x4206, @PID@, 0, 0) == 0"),
    won("be traced", "WON = libc.ptrace(0, 0, 0, 0) == 0"),
    won(
        "read the host's memory",
        """
data = ctypes.create_string_buffer(8)
iov = (ctypes.c_size_t * 2)(ctypes.addressof(data), 8)
WON = libc.syscall(310, @PID@, iov, 1, iov, 1, 0) >= 0
""",
    ),
    won("host memory file", "open('/proc/@PID@/mem', 'rb')"),
    won("own memory file", "open('/proc/self/mem', 'r+b')"),
    won("environment", "WON = any('@TOKEN@' in v for v in os.environ.values())"),
    won("own environ file", "open('/proc/self/environ').read()"),
    won("host environ file", "WON = '@TOKEN@' in open('/proc/@PID@/environ').read()"),
    won("host command line", "open('/proc/@PID@/cmdline').read()"),
    won("host files by proc", "open('/proc/@PID@/root/etc/hostname').read()"),
    won("init's root", "os.listdir('/proc/1/root')"),
    won("oom score", "open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    won("outlive the parent", "WON = libc.prctl(1, 0, 0, 0, 0) == 0"),
    won("priority", "os.nice(5); os.setpriority(0, 0, 5)"),
    won("pin to a core", "os.sched_setaffinity(0, {0})"),
)

KERNEL = (
    won("core pattern", "open('/proc/sys/kernel/core_pattern', 'r+')"),
    won("mount", "WON = libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    won("unshare users", "WON = libc.unshare(0x10000000) == 0"),
    won("unshare mounts", "WON = libc.unshare(0x00020000) == 0"),
    won("join a namespace", "WON = libc.setns(0, 0) == 0"),
    won("chroot", "os.chroot('/')"),
    won("become root", "os.setuid(0); WON = os.getuid() == 0"),
    won("change groups", "os.setgroups([0])"),
    won(
        "type into a terminal",
        """
import fcntl
for n in range(8):
    try: fcntl.ioctl(n, 0x5412, b'x'); WON = True
    except OSError: pass
""",
    ),
    won("tcp", "import socket; socket.create_connection(('127.0.0.1', @PORT@), 1)"),
    won("udp", "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', @PORT@))"),
    won("abstract socket", "import socket; socket.socket(1, 1).bind(chr(0) + '@TOKEN@')"),
    won("socket pair", "import socket; socket.socketpair()"),
    won("netlink", "import socket; socket.socket(16, 3)"),
    won("memfd", "os.memfd_create('x')"),
    won(
        "memfd bomb",
        """
held = []
while True:
    held.append(os.memfd_create('x'))
    WON = True
    os.write(held[-1], bytes(1 << 24))
""",
    ),
    won("sysv memory", "WON = libc.shmget(0, 1 << 20, 0o1600) >= 0"),
    won("sysv queue", "WON = libc.msgget(0, 0o1600) >= 0"),
    won("posix queue", "WON = libc.syscall(240, b'/@TOKEN@', 0o102, 0o600, 0) >= 0"),
    won("io_uring", "WON = libc.syscall(425, 8, ctypes.c_char_p(bytes(120))) >= 0"),
    won("bpf", "WON = libc.syscall(321, 0, ctypes.c_char_p(bytes(72)), 72) >= 0"),
    won("perf", "WON = libc.syscall(298, ctypes.c_char_p(bytes(128)), 0, -1, -1, 0) >= 0"),
    won("userfaultfd", "WON = libc.syscall(323, 0) >= 0"),
    won("keyring", "WON = libc.syscall(250, 0, -3, 1) >= 0"),
    won("inotify", "WON = libc.inotify_init() >= 0"),
    won("clock", "time.clock_settime(0, 0.0)"),
    won("host name", "import socket; socket.sethostname('x')"),
    won("another machine word", "WON = libc.syscall(0x40000000 + 39) > 0"),
    won(
        "raise its limits",
        """
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
    resource.setrlimit(kind, (1 << 40, 1 << 40)); WON = True
""",
    ),
    won("loosen the filter", "WON = libc.prctl(22, 0, 0, 0, 0) == 0"),
)
