"""Worker side of the reward kind ``verifiers``: a task set's own reward functions.

Runs inside ``child.py``, never imported by the trainer. A completion becomes a finished trace of
verifiers, which the task scores as the library's own replay of stored traces does: from the
trace alone, with no machine behind it.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

FORK = False


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler: pickled rows in, their total rewards out."""
    import verifiers.v1  # noqa: F401  # pyrefly: ignore  (not within the first deadline)

    def handle(payload: bytes) -> list[float]:
        return asyncio.run(_score_all(pickle.loads(payload)))

    return handle, {}


async def _score_all(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return list(await asyncio.gather(*map(_score, rows)))


async def _score(row: Mapping[str, Any]) -> float:
    if "verifiers" not in row["info"]:
        raise ValueError("the problem is of no task set: its data must be of kind verifiers")
    given = row["info"]["verifiers"]
    if given.get("episodes"):
        raise ValueError("the data has episodes: their reward is of kind environment")
    kind, config = _task_set(given["taskset"], json.dumps(given["options"]))
    task = kind(kind.data_type().model_validate(given["data"]), config)
    trace = _trace(task, row)
    await task.score(trace)
    return trace.reward


@cache
def _task_set(name: str, options: str) -> tuple[Any, Any]:
    """The class of a set's tasks, and the settings that they share."""
    import verifiers.v1 as vf  # pyrefly: ignore[missing-import]

    config = vf.taskset_config_type(name).model_validate({**json.loads(options), "id": name})
    return vf.task_type(name), config.task


def _trace(task: Any, row: Mapping[str, Any]) -> Any:
    """The prompt as the policy saw it and its turn; tokens of the prompt are not counted."""
    import verifiers.v1 as vf  # pyrefly: ignore[missing-import]
    from verifiers.v1.state import state_cls  # pyrefly: ignore[missing-import]

    turns = [*row["prompt"], {"role": "assistant", "content": row["text"]}]
    nodes = [
        vf.MessageNode(message=turn, parent=at - 1 if at else None, sampled=at == len(turns) - 1)
        for at, turn in enumerate(turns)
    ]
    usage = vf.Usage(prompt_tokens=0, completion_tokens=len(row["tokens"]))
    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        calls=[vf.ModelCall(node=len(nodes) - 1, usage=usage)],
        state=state_cls(type(task))(),
        is_completed=True,
        ok=True,
        stop_condition="agent_completed",
    )
