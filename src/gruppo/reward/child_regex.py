"""Worker side of the regex reward: tells whether a pattern matches a text.

Runs inside ``child.py``, never imported by the trainer. Each match has a timer of processor time
whose signal keeps its default action: the process ends, whatever ``re`` is doing.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable

FORK = True


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler: ``{"pattern", "text"}`` as JSON in, true or false out."""
    full, flags, cpu = settings["full"], settings["flags"], settings["cpu_s"]

    def handle(payload: bytes) -> bool:
        request = json.loads(payload)
        compiled = re.compile(request["pattern"], flags)
        match = compiled.fullmatch if full else compiled.search
        signal.setitimer(signal.ITIMER_PROF, cpu)
        try:
            return match(request["text"]) is not None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    return handle, {}
