"""Worker side of the gym reward: scores an answer with reasoning-gym, and nonsense beside it.

Runs inside ``child.py``, never imported by the trainer. Each request has a timer of processor time
whose signal keeps its default action: the process ends, whatever the scorer is doing.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
from collections.abc import Callable

FORK = True

# No answer to any question: a sentence, an empty one, and a number that nobody asks for.
NONSENSE = ("no idea whatsoever", "", "-987654321")

Scorer = Callable[[str, dict], float]


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler: a pickled ``{"task", "entry", "answer"}`` in, its scores out."""
    try:
        import reasoning_gym  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError('it needs reasoning-gym: pip install "gruppo[gym]"') from error
    scorers: dict[str, Scorer] = {}

    def handle(payload: bytes) -> dict[str, float | str]:
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


def _scored(scorer: Scorer, answer: str, entry: dict) -> dict[str, float | str]:
    try:
        value = float(scorer(answer, entry))
    except Exception as error:  # whatever a scorer makes of text that it did not expect
        if isinstance(own := entry.get("answer"), str):
            scorer(own, entry)  # one that raises here too is broken: no fault of the answer
        return {"raised": f"{type(error).__name__}: {error}"[:200]}
    nonsense = 0.0
    for text in NONSENSE:
        with contextlib.suppress(Exception):
            nonsense = max(nonsense, float(scorer(text, entry)))
    return {"value": value, "nonsense": nonsense}
