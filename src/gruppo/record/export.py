"""Writes the stored completions of a run as JSON lines, for other tools and for people."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from gruppo.policy.files import naming
from gruppo.record.database import Database
from gruppo.record.rows import StoredCompletion


def export_samples(
    database: Database, path: Path, *, first: int = 1, last: int | None = None
) -> int:
    r"""Write one JSON object per completion to ``path``, whole or not at all.

    The objects hold step, group, row, problem, source, prompt (messages), answer, completion,
    num_tokens, reward, task, parts, counted, advantage, finish, interaction and failure. Text that
    is no valid Unicode is escaped as JSON allows (``\ud800``).

    Args:
        database: The run's database.
        path: File to write; it is replaced.
        first: First step to take.
        last: Last step to take; None: the last there is.

    Returns:
        How many completions were written.

    Raises:
        OSError: The database cannot be read or the file not written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    with naming(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as stream:
                for completion in database.iterate(first, last):
                    stream.write(sample_line(completion))
                    count += 1
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return count


def sample_line(completion: StoredCompletion) -> str:
    """One line of the export, its newline included."""
    failure = completion.failure
    value = {
        "step": completion.step,
        "group": completion.group,
        "row": completion.row,
        "problem": completion.problem,
        "source": completion.source,
        "prompt": [{"role": m.role, "content": m.content} for m in completion.prompt],
        "answer": completion.answer,
        "completion": completion.text,
        "num_tokens": completion.num_tokens,
        "reward": completion.total,
        "task": completion.task,
        "parts": dict(completion.parts),
        "counted": dict(completion.counted),
        "advantage": completion.advantage,
        "finish": completion.finish,
        "interaction": completion.interaction and asdict(completion.interaction),
        "failure": failure and {"kind": failure.kind, "fault": failure.fault, "text": failure.text},
    }
    line = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value) + "\n"
    return line
