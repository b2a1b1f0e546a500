"""Golden cases of the optimizer: learning-rate schedules and gradient clipping."""

import pytest
import torch

from gruppo.policy import Optim, lr_at
from gruppo.policy.optim import clip_gradients, gradient_norm


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_lr_schedule(golden, schedule: str) -> None:
    case = golden("ctl/lr_schedule")
    given = case["inputs"]
    optim = Optim(
        lr=given["base"],
        warmup_steps=given["warmup"],
        min_ratio=given["min_ratio"],
        schedule=schedule,
    )
    rates = [lr_at(optim, update, given["total"]) / given["base"] for update in given["updates"]]
    assert rates == pytest.approx(case["expected"][schedule], abs=case["tol"])


def test_grad_clip(golden) -> None:
    case = golden("ctl/grad_clip")
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor(case["inputs"]["grad"])
    norm = gradient_norm([weight])
    assert float(norm) == pytest.approx(case["expected"]["norm"], abs=case["tol"])
    clip_gradients([weight], norm, case["inputs"]["max_norm"])
    assert weight.grad.tolist() == pytest.approx(case["expected"]["clipped"], abs=case["tol"])
    assert float(weight.grad[0]) / 3 == pytest.approx(case["expected"]["scale"], abs=case["tol"])
