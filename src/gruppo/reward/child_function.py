"""Worker side of named reward functions: import the function, call it, return plain data.

Runs inside ``child.py``, never imported by the trainer. It trusts the requests (the trainer pickled
them); the trainer does not trust what comes back, which is why that is JSON.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FORK = False

_CONVENTIONAL = ("compute_score", "reward_func")


def make(settings: dict) -> tuple[Callable[[bytes], object], dict]:
    """Return the handler for pickled rows, and the contract the function is called by."""
    # child.py has put nothing of gruppo on the path of imports that would load torch.
    contracts = sys.modules["__main__"].load(
        str(Path(__file__).with_name("contracts.py")), "_calls"
    )
    function = find(settings["name"])
    contract = settings["contract"] or contracts.detect(function)
    if contract == "gruppo":  # its types take a second to import: not within the first deadline
        importlib.import_module("gruppo.types")

    def handle(payload: bytes) -> list:
        rows = pickle.loads(payload)
        if contract == "gruppo":
            return [_plain(item) for item in function(*rows)]
        return contracts.CALLS[contract](function, rows, settings["form"])

    return handle, {"contract": contract}


def find(name: str) -> Callable[..., Any]:
    """Import ``package.module:function``, ``path/to/file.py:function`` or ``path/to/file.py``."""
    place, colon, wanted = name.rpartition(":")
    if not colon or wanted.endswith(".py"):
        place, wanted = name, ""
    is_file = place.endswith(".py")
    module = _from_file(Path(place)) if is_file else importlib.import_module(place)
    names = (wanted,) if wanted else tuple(n for n in _CONVENTIONAL if n in vars(module))
    if len(names) != 1 or names[0] not in vars(module):
        raise ValueError(
            f"{name}: name the function, as in {place}:my_reward"
            if not wanted
            else f"{place} has no function {wanted!r}"
        )
    function = vars(module)[names[0]]
    if not callable(function):
        raise ValueError(f"{name} is no function")
    return function


def _from_file(path: Path) -> ModuleType:
    """Import a file as a program would: its folder is searched for its own imports."""
    path = path.expanduser()  # a recorded recipe has ~ for the home folder
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    return sys.modules["__main__"].load(str(path), f"gruppo_reward_{path.stem}")


def _plain(item: Any) -> object:
    """Return a value as data: a Score as its numbers, a NumPy or torch scalar as a float."""
    from gruppo.types import Score

    if not isinstance(item, Score):
        unboxed: object = sys.modules["_calls"].values([item])[0]
        return unboxed
    error = item.error
    return {
        "total": item.total,
        "task": item.task,
        "steps": item.steps,
        "error": None if error is None else [error.kind, error.fault, error.text],
    }
