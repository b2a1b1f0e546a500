"""Engines draw completions: token ids in, token ids and log-probabilities out.

What every engine must do is the ``Engine`` protocol of ``gruppo.types``; one suite of tests runs
on all of them. An engine knows no reward, no problem and no chat template.

Names are imported when they are first used: settings that share ``check_sampling`` must not wait
for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gruppo.engine.base import check_requests, check_sampling, complete
    from gruppo.engine.local import LocalEngine
    from gruppo.engine.sampler import keyed_uniform, sample, stream, uniforms

_HOMES = {
    "LocalEngine": "gruppo.engine.local",
    "check_requests": "gruppo.engine.base",
    "check_sampling": "gruppo.engine.base",
    "complete": "gruppo.engine.base",
    "keyed_uniform": "gruppo.engine.sampler",
    "sample": "gruppo.engine.sampler",
    "stream": "gruppo.engine.sampler",
    "uniforms": "gruppo.engine.sampler",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(_HOMES[name]))[name]
