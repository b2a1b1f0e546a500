"""Two ranks with half of the groups each have the gradient of one process with all of them."""

import json
import socket
import subprocess
import sys

import pytest

WORKER = """
import dataclasses, json, sys, torch
from gruppo import dist
from gruppo.model import load
from gruppo.objective import PRESETS, Coefficients, Constant, PromptMean
from gruppo.policy import Optim, Policy
from gruppo.settings import UpdateSettings
from gruppo.types import Evidence, Rollout
from gruppo.update import OptimizerStep, Targets
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# its own works in float32, whatever the model's type
LlamaRMSNorm.forward = lambda self, x: (
    self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
)
folder, rank, world, port = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
if world > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )

def batch(groups):
    draw = torch.Generator().manual_seed(1)
    length = torch.randint(1, 8, (12,), generator=draw)
    mask = torch.arange(7) < length[:, None]
    tokens = torch.randint(0, 256, (12, 7), generator=draw)
    total = torch.rand(12, generator=draw, dtype=torch.float64)
    total[5] = float("nan")
    rows = torch.tensor([g * 3 + i for g in groups for i in range(3)])
    prompts = ((5, 6, 7), (8, 9), (10, 11, 12, 13), (14,))
    return Rollout(
        prompts=tuple(prompts[g] for g in groups), tokens=tokens[rows], mask=mask[rows],
        engine_logp=torch.full((len(rows), 7), -5.5), length=length[rows],
        group=torch.arange(len(groups)).repeat_interleave(3), total=total[rows],
        task=total[rows], parts=total[rows, None], part_names=("a",),
        part_weights=torch.ones(1, dtype=torch.float64),
        truncated=torch.zeros(len(rows), dtype=torch.bool), steps=((),) * len(rows), baseline=None,
    )

mine = {(0, 1): (0, 1, 2, 3), (0, 2): (0,), (1, 2): (1, 2, 3)}[rank, world]
model = load(folder, dtype=torch.float64).model
policy = Policy(model, optim=Optim(), total_updates=1, compute_dtype=torch.float64)
found = {}
objectives = {name: PRESETS[name].objective for name in ("default", "dr_grpo", "gspo")}
objectives["prompts"] = dataclasses.replace(objectives["default"], weights=PromptMean())
for name, objective in objectives.items():
    if isinstance(objective.weights, Constant):
        objective = dataclasses.replace(objective, weights=Constant(length=7))
    rollout = batch(mine)
    targets = Targets(
        rollout=rollout, evidence=Evidence(), advantage=objective.credit(rollout, Evidence())
    )
    step = OptimizerStep(policy, objective, targets, Coefficients(entropy=0.1), UpdateSettings())
    step.accumulate(torch.arange(len(rollout.group)), first=True)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    policy.discard_gradient()
    # what a data-parallel wrapper does: the mean over ranks
    found[name] = (dist.all_sum(grads) / world)[::37].tolist()
if rank == 0:
    print(json.dumps(found))
if world > 1:
    torch.distributed.destroy_process_group()
"""


def gradients(folder, world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = [sys.executable, "-c", WORKER, str(folder)]
    ranks = [
        subprocess.Popen(
            [*program, str(rank), str(world), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    return json.loads(said[0])


@pytest.mark.slow
def test_the_gradient_of_two_ranks_is_that_of_one(tiny_folder):
    one, two = gradients(tiny_folder, 1), gradients(tiny_folder, 2)
    for name, expected in one.items():
        assert max(map(abs, expected)) > 1e-4
        assert two[name] == pytest.approx(expected, rel=0, abs=1e-12), name
