"""Takes a gradient with little address space, then the same with all of it; prints JSON.

Run by test_memory_faults.py: ``python memory_child.py <model folder> <bytes left>``.
"""

import json
import logging
import resource
import sys
from pathlib import Path

import torch

from gruppo.memory import release_heap
from gruppo.model import load
from gruppo.policy import Optim, Policy
from gruppo.settings import UpdateSettings
from gruppo.types import Rollout
from gruppo.update import OptimizerStep
from support.update_steps import named, targets_of

GROUPS, SIZE, LENGTH = 300, 4, 64


def rollout(groups: int) -> Rollout:
    """Groups of completions of one length after prompts of three tokens; half of them right."""
    rows = groups * SIZE
    draw = torch.Generator().manual_seed(1)
    total = torch.arange(rows, dtype=torch.float64) % 2
    return Rollout(
        prompts=tuple((5, 6 + number % 200, 7 + number // 200) for number in range(groups)),
        tokens=torch.randint(0, 256, (rows, LENGTH), generator=draw),
        mask=torch.ones(rows, LENGTH, dtype=torch.bool),
        engine_logp=-6.0 + torch.rand(rows, LENGTH, generator=draw),
        group=torch.arange(groups).repeat_interleave(SIZE),
        total=total,
        task=total,
        parts=total[:, None],
        part_names=("right",),
        part_weights=torch.ones(1, dtype=torch.float64),
        length=torch.full((rows,), LENGTH),
        truncated=torch.zeros(rows, dtype=torch.bool),
        steps=((),) * rows,
        baseline=None,
    )


def gradient(policy: Policy, groups: int) -> tuple[torch.Tensor, int | None]:
    """The gradient of the first step, and the micro-batch's size that was found to fit."""
    settings, objective = UpdateSettings(tokens_per_microbatch=10**6), named("default")
    targets = targets_of(policy, objective, rollout(groups), settings)
    step = OptimizerStep(policy, objective, targets, objective.coefficients, settings)
    step.accumulate(torch.arange(groups * SIZE), first=True)
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.discard_gradient()
    return found, step.fitting.limit


def address_space() -> int:
    """Bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.said.append(record.getMessage())


if __name__ == "__main__":
    folder, left = sys.argv[1], int(sys.argv[2])
    kept = Kept()
    logging.getLogger("gruppo.memory").addHandler(kept)
    policy = Policy(load(folder).model, optim=Optim(), total_updates=1)
    gradient(policy, 2)  # threads, libraries and kernels are there after this
    release_heap()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + left, resource.RLIM_INFINITY))
    small, limit = gradient(policy, GROUPS)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    whole, unlimited = gradient(policy, GROUPS)
    apart = float((small - whole).abs().max() / whole.abs().max())
    print(json.dumps({"limit": limit, "unlimited": unlimited, "apart": apart, "said": kept.said}))
