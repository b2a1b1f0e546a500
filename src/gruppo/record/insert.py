"""How groups, samples, metrics and findings become rows. Opens no transaction of its own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gruppo.record import codec
from gruppo.record.rows import Finding
from gruppo.record.scrub import scrub_values
from gruppo.types import Completion, Group, Score

Row = tuple[object, ...]


def insert_metrics(
    link: sqlite3.Connection,
    table: Literal["metrics", "evaluations"],
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Insert one row per metric; SQLite keeps a NaN as NULL."""
    link.executemany(
        f"INSERT INTO {table} VALUES (?, ?, ?)",
        [(step, codec.pack_text(name), float(value)) for name, value in metrics.items()],
    )


def insert_findings(link: sqlite3.Connection, findings: Sequence[Finding]) -> None:
    """Insert what the health rules found."""
    link.executemany(
        "INSERT INTO findings VALUES (?, ?, ?, ?)",
        [(f.step, f.id, f.severity, detail_text(f.detail)) for f in findings],
    )


def insert_groups(
    link: sqlite3.Connection,
    step: int,
    groups: Sequence[Group],
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"] | None,
    *,
    tokens: bool,
) -> None:
    """Insert ``groups`` and their completions.

    Args:
        link: The connection, inside a transaction.
        step: Their step.
        groups: The groups to store.
        advantages: Rows in group order; it may go on beyond ``groups``.
        tokens: False to leave per-token values out.
    """
    row = 0
    for index, group in enumerate(groups):
        problem = group.problem
        link.execute(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                step,
                index,
                codec.pack_text(problem.id),
                codec.pack_text(problem.source),
                codec.pack_messages(problem.prompt),
                codec.pack_optional(problem.answer),
                codec.pack_ints(group.prompt_tokens) if tokens else None,
                group.baseline,
            ),
        )
        for number, (completion, score) in enumerate(
            zip(group.completions, group.scores, strict=True)
        ):
            advantage = None if advantages is None else advantages[row]
            values = _completion_values(completion, score, advantage, tokens=tokens)
            link.execute(_INSERT_COMPLETION, (step, index, number, *values))
            row += 1


def insert_samples(link: sqlite3.Connection, step: int, groups: Sequence[Group]) -> None:
    """Insert the completions of an evaluation, texts and scores only."""
    link.executemany(
        "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ((step, index, *values) for index, values in enumerate(_sample_values(groups))),
    )


def detail_text(detail: Mapping[str, object]) -> str:
    """A detail as JSON: secrets scrubbed, numbers that are not finite as text."""
    return json.dumps(codec.finite(scrub_values(detail)))


_INSERT_COMPLETION = f"INSERT INTO completions VALUES ({', '.join('?' * 18)})"


def _completion_values(
    completion: Completion, score: Score, advantage: Tensor | None, *, tokens: bool
) -> Row:
    """Columns of a completion from ``text`` on."""
    size = len(completion.tokens)
    mean, per_token = _advantage_values(completion, advantage)
    per_token_values: Row = (None, None, None, None)
    if tokens:
        per_token_values = (
            codec.pack_ints(completion.tokens),
            codec.pack_floats(completion.logp),
            codec.pack_bools(completion.mask),
            per_token,
        )
    return (
        codec.pack_text(completion.text),
        *per_token_values,
        size,
        min(completion.version, default=None),
        mean,
        score.total,
        score.task,
        codec.pack_parts(score.parts),
        completion.finish,
        codec.pack_failure(score.error),
        codec.pack_interaction(completion.interaction),
        codec.pack_parts(score.counted) if score.counted else None,
    )


def _advantage_values(
    completion: Completion, advantage: Tensor | None
) -> tuple[float | None, bytes | None]:
    """One number for the completion, and per-token values if there are any."""
    if advantage is None:
        return None, None
    if advantage.ndim == 0:
        return float(advantage), None
    values = advantage[: len(completion.tokens)].tolist()
    trained = [v for v, kept in zip(values, completion.mask, strict=True) if kept]
    mean = sum(trained) / len(trained) if trained else 0.0
    return mean, codec.pack_floats(values)


def _sample_values(groups: Sequence[Group]) -> Iterator[Row]:
    for group in groups:
        problem = group.problem
        for completion, score in zip(group.completions, group.scores, strict=True):
            yield (
                codec.pack_text(problem.id),
                codec.pack_text(problem.source),
                codec.pack_messages(problem.prompt),
                codec.pack_optional(problem.answer),
                codec.pack_text(completion.text),
                score.total,
                score.task,
                completion.finish,
            )
