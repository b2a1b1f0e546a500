"""From exceptions to exit codes and messages; the only place that knows the codes.

0 done, 1 a finding, 2 user error, 3 input/output, 4 numeric, 5 engine or reward failure, 70 a bug
of ours, 130 / 143 interrupted by SIGINT / SIGTERM.
"""

from __future__ import annotations

import platform
import sys
import traceback
from typing import Final

from gruppo import __version__
from gruppo.errors import NumericError, OutOfMemory, ServiceError
from gruppo.interrupt import Interrupted

USER_ERROR: Final = 2
IO_ERROR: Final = 3
NUMERIC_ERROR: Final = 4
SERVICE_ERROR: Final = 5
BUG: Final = 70

_OUT_OF_MEMORY: Final = frozenset({"MemoryError", "OutOfMemoryError"})
_MEMORY_HELP: Final = (
    "out of memory: lower train.tokens_per_microbatch, rollout.max_tokens or "
    "rollout.prompts_per_step, or take a smaller model"
)


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends the program with.

    Example:
        >>> exit_code(ValueError("bad")), exit_code(FileNotFoundError("x")), exit_code(KeyError(1))
        (2, 3, 70)
    """
    match error:
        case Interrupted():
            return error.exit_code
        case KeyboardInterrupt():
            return 130
        case NumericError() | FloatingPointError():
            return NUMERIC_ERROR
        case ServiceError():
            return SERVICE_ERROR
        case OSError():
            return IO_ERROR
        case ValueError() | OutOfMemory():
            return USER_ERROR
        case _ if _is_ours_to_explain(error):
            return USER_ERROR
        case _:
            return BUG


def explain(error: BaseException) -> str:
    """What to print about an exception: the error itself, or for a bug what to report."""
    code = exit_code(error)
    if isinstance(error, Interrupted):
        return f"{error}: stopped"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if _is_out_of_memory(error):
        return f"error: {_MEMORY_HELP}"
    if code == BUG:
        return _report(error)
    return f"error: {error}"


def _is_out_of_memory(error: BaseException) -> bool:
    """By name and words: torch is not imported for it."""
    words = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return words or type(error).__name__ in _OUT_OF_MEMORY


def _is_ours_to_explain(error: BaseException) -> bool:
    """A missing extra (its message says what to install) or a job too large for this machine."""
    if _is_out_of_memory(error):
        return True
    return isinstance(error, ImportError) and "pip install" in str(error)


def _report(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(error))
    return (
        f"{trace}\nThis is a bug in gruppo. Please report it with the lines above, the command and "
        f"the recipe.\ngruppo {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}{_torch_version()}"
    )


def _torch_version() -> str:
    torch = sys.modules.get("torch")  # never imported for the sake of an error message
    return "" if torch is None else f", torch {vars(torch).get('__version__', '?')}"
