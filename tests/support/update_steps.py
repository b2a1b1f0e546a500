"""A small rollout, policies to train on it, and the targets of an objective."""

import dataclasses
import math

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gruppo.model import load
from gruppo.objective import PRESETS, Constant, Objective
from gruppo.policy import Optim, Policy
from gruppo.settings import UpdateSettings
from gruppo.types import Rollout
from gruppo.update import Targets, gather_evidence

LENGTHS = (5, 2, 7, 1, 4, 3, 6, 6, 2, 5, 1, 3)
# group 1 is dead, row 10 unscored
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.25, 0.25, 0.25, 0.25, 1.0, 0.0, math.nan, 0.25)


def rollout(rewards=REWARDS) -> Rollout:
    """Three groups of four completions after prompts of 3, 6 and 2 tokens; row 2 has a hole."""
    draw = torch.Generator().manual_seed(1)
    length = torch.tensor(LENGTHS)
    mask = torch.arange(7) < length[:, None]
    tokens = torch.randint(0, 256, (12, 7), generator=draw) * mask
    mask[2, 3] = False
    total = torch.tensor(rewards, dtype=torch.float64)
    return Rollout(
        prompts=((5, 6, 7), (8, 9, 10, 11, 12, 13), (14, 15)),
        tokens=tokens,
        mask=mask,
        engine_logp=-6.0 + torch.rand(12, 7, generator=draw),
        group=torch.arange(3).repeat_interleave(4),
        total=total,
        task=total,
        parts=total[:, None],
        part_names=("right",),
        part_weights=torch.ones(1, dtype=torch.float64),
        length=length,
        truncated=torch.zeros(12, dtype=torch.bool),
        steps=((),) * 12,
        baseline=None,
    )


class WideNorm(nn.Module):
    """Llama's own works in float32, whatever the model's type."""

    def __init__(self, norm: LlamaRMSNorm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)


def wide_model(folder):
    """The tiny model, in float64 throughout."""
    model = load(str(folder), dtype=torch.float64).model
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, WideNorm(module))
    return model


def policy_of(model, *, packed=True, reference="none", lr=1e-3) -> Policy:
    policy = Policy(
        model,
        optim=Optim(lr=lr, warmup_steps=0),
        total_updates=10,
        compute_dtype=torch.float64,
        reference=reference,
        packing=packed,
    )
    assert policy.packed == packed
    return policy


def named(name: str) -> Objective:
    objective = PRESETS[name].objective
    if isinstance(objective.weights, Constant):
        return dataclasses.replace(objective, weights=Constant(length=7))
    return objective


def targets_of(policy, objective, batch, settings=None) -> Targets:
    evidence = gather_evidence(policy, objective, batch, settings or UpdateSettings())
    return Targets(rollout=batch, evidence=evidence, advantage=objective.credit(batch, evidence))
