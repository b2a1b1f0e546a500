"""Environments of the ``verifiers`` library (0.4), played in a process of their own.

Nothing here is imported by the trainer; ``gruppo.environment.verifiers`` is its side.
"""
