"""Worker side of the gym reward: scores an answer with reasoning-gym, and nonsense beside it.

Runs inside ``child.py``, never imported by the trainer. Each request has a timer of processor time
whose signal keeps its default action: the process ends, whatever the scorer is doing. Some scorers
evaluate an answer as an expression, so on Linux the copy that answers takes its rights away first:
no files to write, no processes, no network, no signals to others. It can still read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from typing import Final

from gruppo.sandbox import filter as seccomp

FORK = True

# No answer to any question: a sentence, an empty one, and a number that nobody asks for.
NONSENSE = ("no idea whatsoever", "", "-987654321")

_LIFE_S: Final = 86_400  # processor time of a copy: no limit that its requests could reach
_STAY: Final = {"landlock": False, "limits": {}, "uid": None, "parent": None}

Scorer = Callable[[str, dict], float]


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler: a pickled ``{"task", "entry", "answer"}`` in, its scores out."""
    try:
        import reasoning_gym  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError('it needs reasoning-gym: pip install "gruppo[gym]"') from error
    linux = sys.platform == "linux"
    if linux:
        seccomp.machine()
    scorers: dict[str, Scorer] = {}
    sealed: set[int] = set()

    def handle(payload: bytes) -> dict[str, float | str]:
        if os.getpid() not in sealed:
            resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
            if linux:
                _seal()
            sealed.add(os.getpid())
        request = pickle.loads(payload)  # made by the trainer
        task, entry = request["task"], request["entry"]
        if task not in scorers:
            scorers[task] = reasoning_gym.get_score_answer_fn(task)
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
        try:
            return _scored(scorers[task], request["answer"], entry)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    return handle, {}


def _seal() -> None:
    """Let this process, a copy that answers, compute and read and no more."""
    from gruppo.sandbox import lockdown  # its limits have names that only Linux knows

    lockdown.drop(_STAY)
    lockdown.seal(seccomp.strict(pid=os.getpid(), threads=True, files=False), _LIFE_S, 0)


def _ended(error: SystemExit) -> SystemExit:
    return SystemExit(f"the scorer asked the program to end (sys.exit({error.code!r}))")


def _scored(scorer: Scorer, answer: str, entry: dict) -> dict[str, float | str]:
    try:
        value = float(scorer(answer, entry))
    except SystemExit as error:  # an evaluated answer may ask for it too: no verdict either way
        raise _ended(error) from None
    except Exception as error:  # whatever a scorer makes of text that it did not expect
        if isinstance(own := entry.get("answer"), str):
            scorer(own, entry)  # one that raises here too is broken: no fault of the answer
        return {"raised": f"{type(error).__name__}: {error}"[:200]}
    nonsense = 0.0
    for text in NONSENSE:
        with contextlib.suppress(Exception, SystemExit):
            nonsense = max(nonsense, float(scorer(text, entry)))
    return {"value": value, "nonsense": nonsense}
