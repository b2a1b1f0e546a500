"""Groups as plain data for JSON, and back: what a checkpoint keeps of groups not yet trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gruppo.record.scrub import scrub, scrub_values
from gruppo.types import Completion, Failure, Group, Interaction, Message, Problem, Score


def encode_group(group: Group) -> dict[str, Any]:
    """Return a group as plain data for JSON: NaN log-probabilities as None, failures scrubbed."""
    plain = asdict(group)
    for score in plain["scores"]:
        score["error"] = scrub_values(score["error"])
    for completion in plain["completions"]:
        completion["logp"] = [None if math.isnan(x) else x for x in completion["logp"]]
        episode = completion["interaction"]
        if episode is not None and episode["error"] is not None:
            episode["error"] = scrub(episode["error"])
    return plain


def decode_group(plain: Mapping[str, Any]) -> Group:
    """Return the group that ``encode_group`` wrote."""
    problem = plain["problem"]
    return Group(
        problem=Problem(
            id=problem["id"],
            prompt=tuple(Message(**turn) for turn in problem["prompt"]),
            answer=problem["answer"],
            info=problem["info"],
            source=problem["source"],
        ),
        prompt_tokens=tuple(plain["prompt_tokens"]),
        completions=tuple(
            Completion(
                tokens=tuple(item["tokens"]),
                logp=tuple(math.nan if x is None else x for x in item["logp"]),
                mask=tuple(item["mask"]),
                version=tuple(item["version"]),
                text=item["text"],
                finish=item["finish"],
                interaction=decode_interaction(
                    item.get("interaction")
                ),  # not in checkpoints of 0.1
            )
            for item in plain["completions"]
        ),
        scores=tuple(
            Score(
                total=item["total"],
                task=item["task"],
                parts=item["parts"],
                counted=item.get("counted", {}),  # not in checkpoints of 0.1
                steps=tuple((end, value) for end, value in item["steps"]),
                error=Failure(**item["error"]) if item["error"] else None,
            )
            for item in plain["scores"]
        ),
        baseline=plain["baseline"],
    )


def decode_interaction(plain: Mapping[str, Any] | None) -> Interaction | None:
    """Return the episode that ``asdict`` made plain; None for None."""
    if plain is None:
        return None
    messages = tuple(Message(**turn) for turn in plain["messages"])
    return Interaction(
        messages=messages,
        ended=plain["ended"],
        calls=plain["calls"],
        failed_calls=plain["failed_calls"],
        reward=plain["reward"],
        error=plain["error"],
    )
