"""Errors that end a run for a reason other than bad input, each with its exit code.

Bad input is a ``ValueError`` (exit 2) and a file system failure an ``OSError`` (exit 3); those
need no class of ours.
"""


class NumericError(RuntimeError):
    """The run's numbers broke down (non-finite steps in a row, failed self-test). Exit code 4."""


class ServiceError(RuntimeError):
    """An engine, reward or sandbox failed for good. Exit code 5."""


class OutOfMemory(RuntimeError):
    """The job does not fit this machine, however it is cut. Exit code 2."""
