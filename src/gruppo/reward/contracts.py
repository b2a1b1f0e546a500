"""How reward functions written for other libraries are called, on plain data.

A row is a dict: ``prompt`` (list of role/content dicts), ``text``, ``tokens``, ``answer``,
``info``, ``source``. Each contract turns rows into its library's arguments and its result into one
value per row: a number, None (abstains) or ``{"total", "task"}``. Values are passed on as they are;
``base.py`` judges them. Only the standard library is imported: workers load this file too.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, SupportsFloat

Contract = Literal["trl", "verl", "openrlhf", "gruppo"]
Form = Literal["chat", "text"]
Row = Mapping[str, Any]


def detect(function: Callable[..., Any]) -> Contract:
    """Tell the contract from the parameter names, where they leave no doubt.

    ``solution_str`` and ``ground_truth``: verl. ``queries`` and ``labels``: OpenRLHF.
    ``(problem, completions)``: gruppo. ``completions`` and ``**kwargs``: TRL.

    Raises:
        ValueError: anything else.
    """
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if {"queries", "labels"} <= names:
        return "openrlhf"
    if list(parameters)[:2] == ["problem", "completions"]:
        return "gruppo"
    if "completions" in names and _takes_any(function):
        return "trl"
    raise ValueError(
        f"cannot tell how to call a reward function with parameters ({', '.join(parameters)}): "
        'name its contract: "trl", "verl", "openrlhf" or "gruppo"'
    )


def call_trl(function: Callable[..., Any], rows: Sequence[Row], form: Form) -> list:
    """TRL: ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

    ``form = "chat"`` gives message lists, ``"text"`` strings. Columns are those of ``info`` (None
    where a row lacks one); the reference answer is also given as ``answer``, ``solution`` and
    ``ground_truth`` unless the data has such a column. ``log_extra`` and ``log_metric`` do
    nothing, ``trainer_state`` and ``environments`` are None.
    """
    chat = form == "chat"
    columns: dict[str, Any] = {
        "trainer_state": None,
        "environments": None,
        "log_extra": lambda *_, **__: None,
        "log_metric": lambda *_, **__: None,
    }
    for alias in ("answer", "solution", "ground_truth"):
        columns[alias] = [row["answer"] for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row["info"]):
        columns[name] = [row["info"].get(name) for row in rows]
    columns |= {
        "prompts": [list(row["prompt"]) if chat else prompt_text(row) for row in rows],
        "completions": [
            [{"role": "assistant", "content": row["text"]}] if chat else row["text"] for row in rows
        ],
        "completion_ids": [list(row["tokens"]) for row in rows],
    }
    return values(_finish(function(**_accepted(function, columns))))


def call_verl(function: Callable[..., Any], rows: Sequence[Row], form: Form) -> list:
    """verl: ``compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict``.

    Called once per row. A dict's ``score`` is the reward and its ``acc``, if given, the task
    metric. verl takes booleans for numbers, so they are numbers here.
    """
    results: list[object] = []
    for row in rows:
        info = row["info"]
        model = info.get("reward_model")
        truth = model.get("ground_truth") if isinstance(model, Mapping) else None
        arguments = {
            "data_source": info.get("data_source", row["source"]),
            "solution_str": row["text"],
            "ground_truth": row["answer"] if truth is None else truth,
            "extra_info": info.get("extra_info", dict(info)),
        }
        result = _finish(function(**_accepted(function, arguments)))
        if isinstance(result, Mapping):
            score = _plain_number(result["score"])
            results.append({"total": score, "task": _plain_number(result.get("acc", score))})
        else:
            results.append(_plain_number(result))
    return results


def call_openrlhf(function: Callable[..., Any], rows: Sequence[Row], form: Form) -> list:
    """OpenRLHF: ``reward_func(queries, prompts, labels) -> {"rewards", "scores"} | tensor | list``.

    A query is the prompt's text followed by the completion's. ``scores``, if given, are the task
    metric. ``extra_logs`` are dropped.
    """
    prompts = [prompt_text(row) for row in rows]
    arguments = {
        "queries": [prompt + row["text"] for prompt, row in zip(prompts, rows, strict=True)],
        "prompts": prompts,
        "labels": [row["answer"] for row in rows],
    }
    result = _finish(function(**arguments))
    if not isinstance(result, Mapping):
        return values(result)
    totals = values(result["rewards"])
    tasks = values(result.get("scores", totals))
    return [{"total": a, "task": b} for a, b in zip(totals, tasks, strict=True)]


CALLS: dict[str, Callable[[Callable[..., Any], Sequence[Row], Form], list]] = {
    "trl": call_trl,
    "verl": call_verl,
    "openrlhf": call_openrlhf,
}


def prompt_text(row: Row) -> str:
    """Return the messages' contents, a line break between them."""
    return "\n".join(message["content"] for message in row["prompt"])


def values(result: object) -> list:
    """Return a list, tuple, array or tensor as a list of plain numbers where they are numbers."""
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise TypeError(f"the reward function returned {type(result).__name__}, not a list")
    return [_unboxed(item) for item in result]


def _unboxed(item: object) -> object:
    """Turn a NumPy or torch scalar into a float; leave everything else to be judged."""
    if isinstance(item, bool | int | float | str) or not isinstance(item, SupportsFloat):
        return item
    return float(item)


def _plain_number(item: object) -> object:
    return float(item) if isinstance(item, bool) else _unboxed(item)


def _takes_any(function: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop the arguments that a function without ``**kwargs`` does not name."""
    if _takes_any(function):
        return arguments
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _finish(result: object) -> object:
    """Wait for an async function's result, in a thread: the caller may run an event loop."""
    if not isinstance(result, Awaitable):
        return result

    async def wait() -> object:
        return await result

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()
