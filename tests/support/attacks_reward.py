"""Attacks on the reward: programs that use up what there is, and results that lie."""

from support.attack import Attack, raw, side

RESOURCES = (
    side("memory bomb", "x = []\nwhile True: x.append(bytearray(1 << 24))", slow=True),
    side("mmap bomb", "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))"),
    side("pipes", "x = []\nwhile True: x.append(os.pipe())"),
    raw("endless stdout", "while True: sys.stdout.write('x' * 4096)"),
    raw("endless stderr", "while True: sys.stderr.write('x' * 4096)"),
    raw("endless loop", "while True: pass", slow=True),
    raw("sleep", "time.sleep(1000)", slow=True),
    raw(
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
    raw("tower of powers", "x = 9 ** 9 ** 9", slow=True),
    raw("regular expression", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", slow=True),
    raw("compile bomb", "compile('(' * 10**6 + ')' * 10**6, 'x', 'eval')", slow=True),
    raw("deep source", "eval('-' * 10**7 + '1')", slow=True),
    raw("folding bomb", "eval('1 << 10 ** 9 << 10 ** 9')", slow=True),
    raw(
        "del loop",
        """
class Loop:
    def __del__(self):
        while True: pass
Loop()
""",
        slow=True,
    ),
    raw(
        "deep recursion",
        """
sys.setrecursionlimit(10 ** 9)
def deep(): deep()
deep()
""",
        slow=True,
    ),
    raw("segfault", "ctypes.string_at(0)"),
    raw("abort", "os.abort()"),
)

RESULTS = (
    raw("exit", "sys.exit(0)"),
    raw("hard exit", "os._exit(0)"),
    raw("exit in the function", "def solve(n): sys.exit(0)"),
    raw("hard exit in the function", "def solve(n): os._exit(0)"),
    raw(
        "always equal",
        """
class Same:
    def __eq__(self, other): return True
def solve(n): return Same()
""",
    ),
    raw(
        "an int that is equal",
        """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return Same(1)
""",
    ),
    raw(
        "a dict that lies",
        """
class Lies(dict):
    def items(self): return [('value', 1)]
def solve(n): return Lies()
""",
    ),
    raw(
        "a class that lies",
        """
class Lies:
    __class__ = int
def solve(n): return Lies()
""",
    ),
    raw(
        "pickle",
        """
class Run:
    def __reduce__(self): return os.system, ('touch @FOLDER@/pickled',)
def solve(n): return Run()
""",
    ),
    raw("nan", "def solve(n): return float('nan')"),
    raw("infinity", "def solve(n): return float('inf')"),
    raw("a text of 1 GB", "def solve(n): return 'x' * (1 << 30)"),
    raw(
        "a reply of 1 GB",
        """
def solve(n):
    frame = sys._getframe()
    while 'call' not in frame.f_locals: frame = frame.f_back
    head = '{"id": "' + frame.f_locals['call']['id'] + '", "value": "'
    for n in range(63, 0, -1):
        try:
            os.write(n, head.encode())
            for _ in range(1 << 14): os.write(n, b'x' * 65536)
        except OSError: pass
""",
    ),
    raw("a large number", "def solve(n): return 10 ** 200000", slow=True),
    raw(
        "deep lists",
        """
def solve(n):
    x = []
    for _ in range(100_000): x = [x]
    return x
""",
    ),
    raw("a list of itself", "x = []; x.append(x)\ndef solve(n): return x"),
    raw("a generator", "def solve(n): yield 1"),
    raw("colliding numbers", "def solve(n): return [i * (2 ** 61 - 1) for i in range(10 ** 5)]"),
    raw(
        "colliding keys",
        """
def solve(n): return {-i * (2 ** 61 - 1): i for i in range(3000)}
""",
    ),
    raw(
        "replaced built-ins",
        """
import builtins, json
builtins.type = lambda *a: int
builtins.isinstance = lambda *a: True
json.dumps = lambda *a, **k: '{"passed": true}'
def solve(n): return 1
""",
    ),
    raw("true for one", "def solve(n): return True"),
    raw(
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
    raw(
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
    raw(
        "spoofed lines",
        """
for n in range(64):
    try: os.write(n, b'{"passed": true, "score": 1, "value": 1}\\nAll tests passed\\n')
    except OSError: pass
""",
    ),
    raw(
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
    raw(
        "answers ahead",
        """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == 'Channel':
        for _ in range(100): thing.send({'id': '', 'value': 1})
def solve(n): return 1
""",
    ),
    raw(
        "commands read ahead",
        """
for n in range(3, 64):
    try: os.set_blocking(n, False); os.read(n, 1 << 20)
    except OSError: pass
def solve(n): return 1
""",
    ),
    raw(
        "flooded replies",
        """
for n in range(3, 64):
    try:
        while True: os.write(n, b'x' * 65536)
    except OSError: pass
""",
    ),
    raw(
        "deep reply",
        """
for n in range(3, 64):
    try: os.write(n, b'{"id": ' + b'[' * 900_000 + b'\\n')
    except OSError: pass
""",
    ),
    raw(
        "odd numbers in a reply",
        """
for n in range(3, 64):
    try: os.write(n, b'{"id": ' + b'9' * 500_000 + b', "value": NaN}\\n')
    except OSError: pass
""",
    ),
    raw(
        "exit spoof",
        """
import atexit
atexit.register(lambda: [os.write(n, b'{"passed": true}\\n') for n in (1, 2)])
""",
    ),
    raw("descriptors closed", "os.closerange(0, 64)"),
    raw(
        "strange bytes",
        r"""
os.write(1, b'\xff\xfe\x00\x1b[2J\x1b]0;x\x07')
raise ValueError('\u202e\x1b[31m\x00\udc80')
""",
    ),
    raw(
        "error that raises",
        """
class Bad(Exception):
    def __str__(self): raise Bad
def solve(n): raise Bad
""",
    ),
    raw("syntax error", "def solve(n) return"),
    Attack(name="nul in the source", source="def solve(n):\0 return 1"),
    Attack(name="surrogate in the source", source="x = '\ud800'\ndef solve(n): return 1"),
)
