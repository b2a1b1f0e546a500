"""Reward functions of the user, written for gruppo, TRL, verl or OpenRLHF, as rewards.

``Function`` names one by module or file and runs it in a worker process with a deadline;
``InProcess`` wraps a Python callable and runs it here, exceptions caught, without a deadline.
Rows are separate for TRL, verl and OpenRLHF (those libraries cut batches at will too): when a call
fails, it is repeated in smaller pieces, so that one bad row costs only itself. A function of
gruppo's own contract sees whole groups, and fails by the group.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gruppo.reward.base import GroupRows, guarded, ungraded
from gruppo.reward.contracts import CALLS, Contract, Form, Row, detect
from gruppo.types import Completion, Failure, Problem, Score
from gruppo.worker.process import Death, Pool, Reply, Setup, pool

# One call's result: a value per row, or why there is none. The values are whatever the user's
# function returned (hence Any below): base.py judges them.
Outcome = list | Failure
# A reward that hangs on every row would hold a step for hours.
_MAX_DEATHS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A reward function named by module or file, run in worker processes of its own.

    ``name`` is ``"package.module:function"``, ``"path/to/file.py:function"`` or a file alone,
    where the function has the name verl or OpenRLHF expect (``compute_score``, ``reward_func``).
    ``contract`` says how it is called; None detects it from the parameter names
    (``contracts.detect``). ``form`` is how a TRL function gets prompts and completions: as "chat"
    messages or as "text". A call that takes longer than ``timeout_s`` seconds is killed; verl
    functions are called once per row, the others once with all rows. ``workers`` > 1 lets several
    calls run side by side. What the function prints is dropped. The worker inherits the
    environment without variables that look like secrets (``..._KEY``, ``..._TOKEN``), but those
    that ``secrets`` names.

    Raises:
        ValueError: an empty name, a timeout or number of workers that is not positive.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["function"] = "function"
    name: str
    contract: Contract | None = None
    form: Form = "chat"
    timeout_s: float = 60.0
    workers: int = 1
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("function.name is empty: name it as package.module:function")
        if not (self.timeout_s > 0 and self.workers > 0):
            raise ValueError(
                f"function.timeout_s = {self.timeout_s}, workers = {self.workers}: "
                "both must be positive"
            )

    def open(self) -> Contract:
        """Start a worker, and return the contract that the function is called by.

        Raises:
            ValueError: the function cannot be imported, or its contract cannot be told, or a
                variable that ``secrets`` names is not set.
        """
        require_secrets(self.secrets, f"reward function {self.name!r}")
        info = self._pool().start()
        if isinstance(info, Death):
            raise ValueError(f"reward function {self.name!r}: {info.text}")
        assert isinstance(info, dict), "child_function.py says its contract"
        return info["contract"]

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Any]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Any]]:
        """Grade all groups."""
        try:
            contract = self.contract or self.open()
        except ValueError as error:
            return [[ungraded("start", str(error))] * len(c) for _, c in groups]
        return score_by(contract, groups, self._run)

    def close(self) -> None:
        """End the worker processes."""
        self._pool().close()

    def _run(self, calls: Sequence[Any]) -> list[Outcome]:
        """Send every call to a worker."""
        return ask(self._pool(), calls, name=self.name, timeout_s=self.timeout_s)

    def _pool(self) -> Pool:
        settings = {"name": self.name, "contract": self.contract, "form": self.form}
        setup = Setup(
            handler="reward/child_function.py", settings=json.dumps(settings), secrets=self.secrets
        )
        return pool(setup, self.workers)


@dataclass(frozen=True, slots=True)
class InProcess:
    """A Python callable of any contract, run in this process: no deadline, exceptions caught.

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return {"score": 1.0 if solution_str == ground_truth else -1.0, "acc": True}
        >>> from gruppo.types import Completion, Problem
        >>> row = Completion(tokens=(), logp=(), mask=(), version=(), text="4", finish="stop")
        >>> InProcess(compute_score)(Problem(id="a", prompt=(), answer="4"), [row])
        [Score(total=1.0, task=1.0, parts={}, counted={}, steps=(), error=None)]

    Raises:
        ValueError: no contract is given and the parameter names do not tell it.
    """

    function: Callable[..., Any]
    contract: Contract | None = None
    form: Form = "chat"

    def __post_init__(self) -> None:
        if self.contract is None:
            detect(self.function)

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Any]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Any]]:
        """Grade all groups."""
        return score_by(self.contract or detect(self.function), groups, self._run)

    def _run(self, calls: Sequence[Any]) -> list[Outcome]:
        contract = self.contract or detect(self.function)

        def one(call: Any) -> list:
            if contract == "gruppo":
                return list(self.function(*call))
            return CALLS[contract](self.function, call, self.form)

        return [guarded(str(self.function), lambda c=call: one(c)) for call in calls]


def require_secrets(names: Sequence[str], about: str) -> None:
    """Raise ValueError if an environment variable that a worker is to read is not set."""
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"{about}: secrets = {list(names)}: {missing[0]} is not set; export it, or leave it out"
        )


def ask(workers: Pool, calls: Sequence[Any], *, name: str, timeout_s: float) -> list[Outcome]:
    """Send every call, pickled, to a worker; ``name`` is what failures say of the reward."""
    results = workers.map([pickle.dumps(call) for call in calls], timeout_s, max_deaths=_MAX_DEATHS)
    return [_outcome(result, name, timeout_s) for result in results]


def _outcome(result: Reply | Death, name: str, timeout_s: float) -> Outcome:
    if isinstance(result, Death):
        about = f"no answer within {timeout_s:g} s" if result.kind == "timeout" else ""
        text = f"{name}: {result.text or about or f'exit status {result.code}'}"
        return Failure(kind=result.kind, fault="grader", text=text)
    if result.error_kind is not None:
        return Failure(kind=result.error_kind, fault="grader", text=f"{name}: {result.error_text}")
    if not isinstance(result.value, list):
        return Failure(kind="type", fault="grader", text=f"{name} returned no list")
    return result.value


def score_by(
    contract: Contract,
    groups: Sequence[GroupRows],
    run: Callable[[Sequence[Any]], list[Outcome]],
) -> list[list[Any]]:
    """Grade ``groups`` through ``run``, which makes a list of calls and never raises.

    A call that fails, or returns a wrong number of values, is made again with each group alone,
    then with each row alone (verl: rows from the start; gruppo: groups only).
    """
    if contract == "gruppo":
        outcomes = run([(problem, tuple(completions)) for problem, completions in groups])
        return [
            _values(outcome, len(completions))
            for outcome, (_, completions) in zip(outcomes, groups, strict=True)
        ]
    rows = [[_row(problem, c) for c in completions] for problem, completions in groups]
    places = [(g, i) for g, row in enumerate(rows) for i in range(len(row))]
    found: dict[tuple[int, int], Any] = {}
    pieces = [places] if contract != "verl" else [[place] for place in places]
    while pieces:
        outcomes = run([[rows[g][i] for g, i in piece] for piece in pieces])
        smaller: list[list[tuple[int, int]]] = []
        for piece, outcome in zip(pieces, outcomes, strict=True):
            if _usable(outcome, len(piece)) or len(piece) == 1:
                found |= zip(piece, _values(outcome, len(piece)), strict=True)
            else:
                smaller += _cut(piece)
        pieces = smaller
    return [[found[g, i] for i in range(len(row))] for g, row in enumerate(rows)]


def _cut(piece: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut a failed call into its groups, or one group into its rows."""
    groups = dict.fromkeys(g for g, _ in piece)
    if len(groups) == 1:
        return [[place] for place in piece]
    return [[place for place in piece if place[0] == g] for g in groups]


def _usable(outcome: Outcome, num_rows: int) -> bool:
    return not isinstance(outcome, Failure) and len(outcome) == num_rows


def _values(outcome: Outcome, num_rows: int) -> list[Any]:
    """Return one value per row, or the reason there is none on every row."""
    if isinstance(outcome, Failure):
        return [Score(total=None, task=None, error=outcome)] * num_rows
    if len(outcome) != num_rows:
        text = f"{len(outcome)} values for {num_rows} completions"
        return [ungraded("length", text)] * num_rows
    return [_value(item) for item in outcome]


def _value(item: Any) -> Any:
    """Turn ``{"total", "task", ..}`` into a Score; base.py judges everything else."""
    if not (isinstance(item, dict) and {"total", "task"} <= item.keys()):
        return item
    for number in (item["total"], item["task"]):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            return number
    error = item.get("error")
    return Score(
        total=item["total"],
        task=item["task"],
        steps=tuple((end, value) for end, value in item.get("steps", ())),
        error=None if error is None else Failure(kind=error[0], fault=error[1], text=error[2]),
    )


def _row(problem: Problem, completion: Completion) -> Row:
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in problem.prompt],
        "text": completion.text,
        "tokens": completion.tokens,
        "answer": problem.answer,
        "info": dict(problem.info),
        "source": problem.source,
    }
