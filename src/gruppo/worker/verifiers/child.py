"""The handler: says what an environment's tools are, and hosts its episodes.

Runs inside ``gruppo/worker/child.py``. Every episode is a copy of this process (``Forks``). A
request is {"do": "start" | "reply" | "end" | "close", ...}, its answer what the copy says next.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

from gruppo.worker.forks import Forks
from gruppo.worker.verifiers.play import play
from gruppo.worker.verifiers.scene import Scene

FORK = False


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler, and the schemas of the tools."""
    scene = Scene.load(settings["taskset"], settings["options"], settings["settings"])
    info = {"tools": asyncio.run(scene.schemas())}

    def run(given: Any, line: socket.socket) -> None:
        asyncio.run(play(scene, given, line, settings["max_result"]))

    forks = Forks(run)

    def handle(payload: bytes) -> object:
        asked = json.loads(payload)
        if asked["do"] == "close":
            forks.end(asked["episode"])
            return {}
        number = forks.start(asked) if asked["do"] == "start" else asked["episode"]
        if asked["do"] != "start":
            forks.send(number, asked)
        answer = forks.receive(number, settings["timeout_s"])
        if "failure" in answer:  # whoever asked knows no episode, and will not close it
            forks.end(number)
        return {**answer, "episode": number}

    return handle, info
