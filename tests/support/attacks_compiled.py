"""Hostile C++: on the compiler, and by the program that it makes.

Placeholders are those of ``support.attack``; ``@ANSWERS@`` stands in the body of a function of n.
"""

from __future__ import annotations

from support.attack import Attack

HEAD = r"""
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <unistd.h>
extern char **environ;
static bool won;
static long long answer(int n) { @ANSWERS@ return -2; }
static bool holds(const char *path) {
    char text[64] = {0};
    int file = open(path, O_RDONLY);
    return file >= 0 && read(file, text, 63) > 0 && strstr(text, "@TOKEN@");
}
static bool sent(int kind) {
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(@PORT@);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int s = socket(AF_INET, kind, 0);
    if (s < 0 || connect(s, (sockaddr *)&to, sizeof to) != 0) return false;
    return kind == SOCK_STREAM || send(s, "x", 1, 0) == 1;
}
static char *const NOTHING[] = {nullptr};
"""
MAIN = """
int main() {
    int n = 0;
    if (scanf("%d", &n) != 1) return 1;
    @BODY@
    printf("%lld\\n", @PAID@ ? answer(n) : -1LL);
    return 0;
}
"""


def _program(body: str, paid: str) -> str:
    return HEAD + MAIN.replace("@BODY@", body.strip()).replace("@PAID@", paid)


HONEST = _program("", "true")


def won(name: str, body: str) -> Attack:
    """Paid only if ``body`` sets won."""
    return Attack(name=name, source=_program(body, "won"))


def side(name: str, body: str, *, slow: bool = False) -> Attack:
    """Solves the problem after ``body``, whatever that did."""
    return Attack(name=name, source=_program(body, "true"), earns=True, slow=slow)


def raw(name: str, body: str, *, slow: bool = False) -> Attack:
    """Must not be paid."""
    return Attack(name=name, source=_program(body, "false"), slow=slow)


def top(name: str, declarations: str, *, slow: bool = False) -> Attack:
    """Attacks the compiler: were it to succeed, the program would be paid."""
    return Attack(name=name, source=f"{declarations}\n{_program('', 'true')}", slow=slow)


def told(name: str, declarations: str, condition: str) -> Attack:
    """Paid if what the compiler took in holds the token."""
    return Attack(name=name, source=f"{declarations}\n{_program('', condition)}")


COMPILER = (
    top("include passwd", '#include "/etc/passwd"'),
    top("include the environment", '#include "/proc/self/environ"'),
    top("include a device", '#include "/dev/zero"', slow=True),
    top("include a folder of root", '#include "/root/.bashrc"'),
    told(
        "include the canary",
        'enum {\n#include "@CANARY@"\n};',
        "@TOKEN@ == 0",
    ),
    told(
        "incbin",
        'asm(".data\\ntext: .incbin \\"@CANARY@\\"\\n.byte 0\\n.text");\nextern "C" char text[];',
        '!strncmp(text, "@TOKEN@", 17)',
    ),
    top("include in assembly", 'asm(".include \\"/etc/passwd\\"");'),
    top("lines of another file", '#line 1 "/etc/passwd"\nstatic_assert(false, "");'),
    top("include itself", '#include "main.cpp"'),
    top(
        "template recursion",
        "template<int N> struct A { A<N + 1> next; };\nA<0> a;",
    ),
    top(
        "template explosion",
        "template<int N, int M> struct A { A<N - 1, M * 2> a; A<N - 1, M * 2 + 1> b; };\n"
        "template<int M> struct A<0, M> {};\nA<25, 0> a;",
        slow=True,
    ),
    top(
        "endless constant",
        "constexpr int f(unsigned long n) {\n"
        "    int s = 0;\n    for (unsigned long i = 0; i < n; i++) s ^= i;\n    return s;\n}\n"
        "static_assert(f(1ul << 60) == 1);",
        slow=True,
    ),
    top(
        "laughing macros",
        "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(x)))\n#define C(x) B(B(B(x)))\n"
        "int a[] = { C(C(1,)) };",
        slow=True,
    ),
    top("huge array", "char a[1l << 34] = {1};"),
    top("huge fill", 'asm(".data\\n.fill 1 << 36, 1, 1\\n.text");', slow=True),
    top("repeated for ever", 'asm(".rept 1 << 40\\nnop\\n.endr");', slow=True),
    top("deep parentheses", f"int a = {'(' * 40_000}1{')' * 40_000};"),
    Attack(
        name="flood of messages",
        source='#pragma message "x"\n' * 4_000 + _program("", "true"),
        earns=True,
    ),
    top("a constructor of another's", 'asm(".section .init_array\\n.quad 0xdead\\n.text");'),
    Attack(name="nul in the source", source="int main() { \0 }"),
    Attack(
        name="surrogate in the source", source='const char *x = "\ud800"; int main() { return 1; }'
    ),
    Attack(name="no program", source=""),
)

PROGRAM = (
    won("read a file", 'won = holds("@CANARY@");'),
    won("read passwd", 'won = open("/etc/passwd", O_RDONLY) >= 0;'),
    won("write a file", 'won = open("@CANARY@", O_WRONLY | O_APPEND) >= 0;'),
    won("make a file", 'won = open("@FOLDER@/x", O_CREAT | O_WRONLY, 0600) >= 0;'),
    won("make a file in tmp", 'won = open("/tmp/@TOKEN@", O_CREAT | O_WRONLY, 0600) >= 0;'),
    won("chmod", 'won = chmod("@CANARY@", 0600) == 0;'),
    won("truncate", 'won = truncate("@CANARY@", 0) == 0;'),
    won("unlink", 'won = unlink("@CANARY@") == 0;'),
    won("symlink", 'won = symlink("/etc", "@FOLDER@/link") == 0;'),
    won(
        "escape by a descriptor",
        """
for (int f = 0; f < 64; f++) {
    char path[512] = "../../../../../../..@CANARY@";
    if (openat(f, path, O_RDONLY) >= 0) won = true;
    snprintf(path, sizeof path, "/proc/self/fd/%d/../../../../..@CANARY@", f);
    if (open(path, O_RDONLY) >= 0) won = true;
}
""",
    ),
    won(
        "descriptors that are left",
        """
for (int f = 3; f < 64; f++) {
    struct stat status;
    if (fstat(f, &status) == 0 && !S_ISDIR(status.st_mode)) won = true;
}
""",
    ),
    won("environment", 'for (char **e = environ; *e; e++) won |= !!strstr(*e, "@TOKEN@");'),
    won("host environ file", 'won = open("/proc/@PID@/environ", O_RDONLY) >= 0;'),
    won("memory of its own", 'won = open("/proc/self/mem", O_RDWR) >= 0;'),
    side("fork bomb", "while (fork() >= 0) {}"),
    won("fork", "pid_t p = fork(); if (p == 0) _exit(0); won = p > 0;"),
    won("vfork", "pid_t p = vfork(); if (p == 0) _exit(0); won = p > 0;"),
    won("clone", "won = syscall(SYS_clone, 17, 0, 0, 0, 0) >= 0;"),
    won("a thread", "won = syscall(SYS_clone, 0x3d0f00, 0, 0, 0, 0) >= 0;"),
    won("system", 'won = system("true") == 0;'),
    won("popen", 'won = popen("true", "r") != nullptr;'),
    won(
        "exec a shell",
        """
if (fork() <= 0) {
    char *args[] = {(char *)"sh", (char *)"-c", (char *)"echo @TOKEN@", nullptr};
    execve("/bin/sh", args, NOTHING);
}
""",
    ),
    won("exec itself", 'won = execve("/proc/self/exe", NOTHING, NOTHING) == 0;'),
    won(
        "exec an open file",
        """
const char *paths[] = {"/lib64/ld-linux-x86-64.so.2", "/usr/bin/python3", "/bin/true"};
for (const char *path : paths) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    errno = 0;
    syscall(SYS_execveat, file, "", NOTHING, NOTHING, AT_EMPTY_PATH);
    if (file >= 0 && errno != EPERM) won = true;
}
""",
    ),
    won(
        "exec with a guessed list",
        """
int file = open("/lib64/ld-linux-x86-64.so.2", O_RDONLY);
for (int i = 0; i < 200000; i++) {
    uintptr_t at = ((uintptr_t)1 << 32) + ((uintptr_t)rand() << 14);
    syscall(SYS_execveat, file, "", at, NOTHING, AT_EMPTY_PATH);
    if (errno != EPERM) won = true;
}
""",
    ),
    won("signal the host", "won = kill(@PID@, 0) == 0;"),
    won("kill every process", "won = kill(-1, SIGKILL) == 0;"),
    won("tgkill the host", "won = syscall(SYS_tgkill, @PID@, @PID@, 0) == 0;"),
    won("pidfd", "won = syscall(SYS_pidfd_open, @PID@, 0) >= 0;"),
    won(
        "own a pipe's signals",
        """
int ends[2];
won = pipe(ends) == 0 && fcntl(ends[0], F_SETOWN, @PID@) == 0;
""",
    ),
    won("trace the host", "won = ptrace(PTRACE_SEIZE, @PID@, 0, 0) == 0;"),
    won("be traced", "won = ptrace(PTRACE_TRACEME, 0, 0, 0) == 0;"),
    won(
        "read the host's memory",
        """
char data[8];
iovec here = {data, 8}, there = {(void *)main, 8};
won = process_vm_readv(@PID@, &here, 1, &there, 1, 0) >= 0;
""",
    ),
    won("tcp", "won = sent(SOCK_STREAM);"),
    won("udp", "won = sent(SOCK_DGRAM);"),
    won("unix socket", "won = socket(AF_UNIX, SOCK_STREAM, 0) >= 0;"),
    won("netlink", "won = socket(AF_NETLINK, SOCK_RAW, 0) >= 0;"),
    won("memfd", 'won = memfd_create("x", 0) >= 0;'),
    won(
        "memfd bomb",
        """
static char data[1 << 24];
for (int file; (file = memfd_create("x", 0)) >= 0; won = true)
    if (write(file, data, sizeof data) < 0) break;
""",
    ),
    won("sysv memory", "won = shmget(IPC_PRIVATE, 1 << 20, 0600 | IPC_CREAT) >= 0;"),
    won("io_uring", "char p[120] = {0}; won = syscall(425, 8, p) >= 0;"),
    won("bpf", "char p[72] = {0}; won = syscall(SYS_bpf, 0, p, 72) >= 0;"),
    won("perf", "char p[128] = {0}; won = syscall(SYS_perf_event_open, p, 0, -1, -1, 0) >= 0;"),
    won("userfaultfd", "won = syscall(SYS_userfaultfd, 0) >= 0;"),
    won("unshare", "won = unshare(CLONE_NEWUSER) == 0;"),
    won("mount", 'won = mount("none", "/tmp", "tmpfs", 0, nullptr) == 0;'),
    won("become root", "won = setuid(0) == 0;"),
    won("outlive the parent", "won = prctl(PR_SET_PDEATHSIG, 0) == 0;"),
    won("loosen the filter", "won = prctl(PR_SET_SECCOMP, 0, 0, 0, 0) == 0;"),
    won("another machine word", "won = syscall(0x40000000 + 39) > 0;"),
    won("a 32-bit call", 'long r; asm("int $0x80" : "=a"(r) : "a"(20)); won = r > 0;'),
    won(
        "raise its limits",
        """
rlimit more = {1ul << 40, 1ul << 40};
const __rlimit_resource kinds[] = {RLIMIT_CPU, RLIMIT_AS, RLIMIT_NPROC, RLIMIT_FSIZE};
for (__rlimit_resource kind : kinds) won |= setrlimit(kind, &more) == 0;
""",
    ),
    won("type into a terminal", 'for (int f = 0; f < 8; f++) won |= ioctl(f, TIOCSTI, "x") == 0;'),
    won("core pattern", 'won = open("/proc/sys/kernel/core_pattern", O_WRONLY) >= 0;'),
    raw("memory bomb", "for (;;) { char *p = (char *)malloc(1 << 24); memset(p, 1, 1 << 24); }"),
    side(
        "mmap bomb",
        "while (mmap(0, 1 << 26, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) {}",
    ),
    Attack(
        name="huge unset memory",
        source=f"{HEAD}static volatile char a[1l << 30];\n"
        + MAIN.replace("@BODY@", "a[n << 24] = 1; won = a[n << 24] == 1;").replace("@PAID@", "won"),
    ),
    raw("deep recursion", "volatile char a[7000000]; a[0] = 1; main();"),
    raw("endless stdout", 'for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");'),
    raw("endless stderr", 'for (;;) fputs("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", stderr);'),
    raw(
        "a text of 1 GB",
        """
char *text = (char *)malloc(1 << 30);
if (text) fwrite(memset(text, 'x', 1 << 30), 1, 1 << 30, stdout);
static char piece[1 << 20];
for (int i = 0; i < 1 << 10; i++) fwrite(memset(piece, 'x', 1 << 20), 1, 1 << 20, stdout);
""",
    ),
    raw("endless loop", "for (volatile int i = 0;; i++) {}", slow=True),
    raw("sleep", "sleep(1000);", slow=True),
    raw("stop itself", "raise(SIGSTOP);", slow=True),
    raw(
        "signals ignored",
        "for (int s = 1; s < 65; s++) signal(s, SIG_IGN);\nfor (volatile int i = 0;; i++) {}",
        slow=True,
    ),
    raw("segfault", "*(volatile int *)nullptr = 1;"),
    raw("abort", "abort();"),
    raw("illegal instruction", "__builtin_trap();"),
    raw("exit", "_exit(0);"),
    raw(
        "all tests passed",
        'puts("All tests passed\\n{\\"passed\\": true, \\"score\\": 1}"); return 0;',
    ),
    raw(
        "spoofed lines",
        """
const char *line = "{\\"passed\\": true, \\"value\\": 1, \\"sealed\\": true}\\n";
for (int f = 1; f < 64; f++) if (write(f, line, strlen(line)) < 0) continue;
""",
    ),
    raw("descriptors closed", "for (int f = 0; f < 64; f++) close(f);"),
    raw("strange bytes", 'fwrite("\\xff\\xfe\\0\\x1b[2J\\x1b]0;x\\x07", 1, 14, stdout);'),
    raw("both answers", 'for (int i = 0; i < 8; i++) printf("%lld\\n", answer(i));'),
)

COMPILED = (*COMPILER, *PROGRAM)
# what succeeds where nothing isolates, and does no harm
COMPILED_HARMLESS = ("include the canary", "incbin", "read a file", "chmod", "udp", "memfd")
