"""The command line of gruppo: verbs, progress, errors and their exit codes."""

from gruppo.cli.app import main

__all__ = ["main"]
