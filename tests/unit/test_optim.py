"""Learning rates, AdamW's groups and the size of an update, by hand."""

import math

import pytest
import torch
from torch import nn

from gruppo.policy import Optim, lr_at
from gruppo.policy.optim import clip_gradients, gradient_norm, make_adamw, update_ratio


def test_first_update_moves_the_weights() -> None:
    assert lr_at(Optim(lr=1.0, warmup_steps=10), 1, 100) == 0.1
    assert lr_at(Optim(lr=1.0, warmup_steps=1), 1, 100) == 1.0
    assert lr_at(Optim(lr=1.0, warmup_steps=0), 1, 100) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_stay_at_the_floor_after_the_end(schedule: str) -> None:
    optim = Optim(lr=2.0, warmup_steps=3, min_ratio=0.25, schedule=schedule)
    assert lr_at(optim, 20, 20) == pytest.approx(0.5)
    assert lr_at(optim, 999, 20) == pytest.approx(0.5)


def test_warmup_longer_than_the_run_only_warms_up() -> None:
    optim = Optim(lr=1.0, warmup_steps=10, schedule="cosine")
    assert [lr_at(optim, k, 5) for k in (1, 3, 5)] == pytest.approx([0.1, 0.3, 0.5])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"lr": -1.0}, "optim.lr = -1.0"),
        ({"lr": math.nan}, "optim.lr = nan"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"eps": 0.0}, "optim.eps"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"grad_clip": 0.0}, "optim.grad_clip = 0.0 must be positive, or left out"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"min_ratio": 1.5}, "optim.min_ratio"),
    ],
)
def test_bad_settings_are_refused(setting: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Optim(**setting)


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    adamw = make_adamw(model, Optim(lr=0.1, weight_decay=0.5))
    model[0].weight.data.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    adamw.step()
    decayed, *spared = model.parameters()
    torch.testing.assert_close(decayed.detach(), torch.full((2, 3), 0.95))
    for p, old in zip(spared, before[1:], strict=True):
        assert torch.equal(p, old)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_adamw(nn.Linear(2, 2).requires_grad_(False), Optim())


def test_first_update_of_adamw_by_hand() -> None:
    """After one step m^ / sqrt(v^) is the gradient's sign: every weight moves by lr."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    module = nn.Module()
    module.register_parameter("weight", weight)
    adamw = make_adamw(module, Optim(lr=0.01, eps=1e-300))
    weight.grad = torch.tensor([[2.0, -7.0]], dtype=torch.float64)
    adamw.step()
    assert weight.tolist() == [pytest.approx([2.99, 4.01], abs=1e-12)]
    # |delta| = lr sqrt(2), |weights| after the step
    expected = 0.01 * math.sqrt(2) / math.hypot(2.99, 4.01)
    assert update_ratio(adamw) == pytest.approx(expected, rel=1e-12)


def test_update_ratio_is_the_measured_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    optim = Optim(lr=3e-3, weight_decay=0.1)
    adamw = make_adamw(model, optim)
    for _ in range(4):
        adamw.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        adamw.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        measured = float((after - before).norm() / after.norm())
        assert update_ratio(adamw) == pytest.approx(measured, rel=1e-9)


def test_small_gradients_are_not_scaled_up() -> None:
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([0.3, 0.4])
    clip_gradients([weight], gradient_norm([weight]), 1.0)
    assert weight.grad.tolist() == pytest.approx([0.3, 0.4])
    assert float(gradient_norm([torch.zeros(1)])) == 0.0
