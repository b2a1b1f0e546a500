"""Engines draw completions: token ids in, token ids and log-probabilities out.

What every engine must do is the ``Engine`` protocol of ``gruppo.types``; one suite of tests runs
on all of them. An engine knows no reward, no problem and no chat template.
"""

from gruppo.engine.base import check_requests, check_sampling, complete
from gruppo.engine.local import LocalEngine
from gruppo.engine.sampler import keyed_uniform, sample, stream, uniforms

__all__ = [
    "LocalEngine",
    "check_requests",
    "check_sampling",
    "complete",
    "keyed_uniform",
    "sample",
    "stream",
    "uniforms",
]
