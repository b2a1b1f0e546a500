"""The algorithm in one file computes what the library computes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gruppo.model import completion_logp, load
from gruppo.objective import (
    Coefficients,
    Grpo,
    KLNaive,
    KLTerm,
    Live,
    Objective,
    PpoClip,
    TokenMean,
    Totals,
    compute_loss,
    make_rows,
)
from gruppo.types import Evidence, Rollout

FILE = Path(__file__).parents[2] / "examples" / "nano.py"


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nano", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_needs_no_library():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 200
    assert "import gruppo" not in text.replace("no import of gruppo", "")
    assert "from gruppo" not in text


def rollout_of(rewards):
    groups, size = rewards.shape
    rows = groups * size
    total = rewards.flatten()
    return Rollout(
        prompts=((1,),) * groups,
        tokens=torch.ones(rows, 1, dtype=torch.long),
        mask=torch.ones(rows, 1, dtype=torch.bool),
        engine_logp=torch.zeros(rows, 1),
        group=torch.arange(groups).repeat_interleave(size),
        total=total,
        task=total,
        parts=total[:, None],
        part_names=("task",),
        part_weights=torch.ones(1, dtype=torch.float64),
        length=torch.ones(rows, dtype=torch.long),
        truncated=torch.zeros(rows, dtype=torch.bool),
        steps=((),) * rows,
        baseline=None,
    )


def test_advantages(nano):
    draw = torch.Generator().manual_seed(0)
    rewards = torch.rand(50, 6, generator=draw, dtype=torch.float64)
    rewards[3], rewards[4] = 0.3, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    rewards[5, :] = 0.1 + torch.arange(6) * 1e-8  # dead but for rounding
    ours = Grpo()(rollout_of(rewards), Evidence())
    theirs = nano.group_advantage(rewards).flatten()
    assert (ours - theirs).abs().max() < 1e-12
    assert theirs.view(50, 6)[[3, 5]].tolist() == [[0.0] * 6] * 2


def case(seed):
    """Ratios around 1, some beyond the clip range, and garbage under the mask."""
    draw = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(8, 9, generator=draw, dtype=torch.float64)
    old = logp + 0.4 * torch.randn(8, 9, generator=draw, dtype=torch.float64)
    reference = logp + 0.5 * torch.randn(8, 9, generator=draw, dtype=torch.float64)
    advantage = torch.randn(8, generator=draw, dtype=torch.float64)
    mask = torch.rand(8, 9, generator=draw) < 0.7
    for tensor, garbage in ((logp, 900.0), (old, float("nan")), (reference, float("-inf"))):
        tensor[~mask] = garbage
    return logp.requires_grad_(), old, reference, advantage, mask


def library_loss(objective, logp, old, reference, advantage, mask):
    group = torch.zeros(8, dtype=torch.long)
    rows = make_rows(
        objective,
        advantage=advantage,
        mask=mask,
        group=group,
        scored=torch.ones(8, dtype=torch.bool),
        old_logp=old,
        engine_logp=None,
        ref_logp=reference,
        totals=Totals.of(mask, group),
        selected=None,
    )
    live = Live(logp=logp, entropy=None, mask=mask)
    return compute_loss(objective, live, rows, objective.coefficients).value


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient(nano, seed, beta):
    logp, old, reference, advantage, mask = case(seed)
    kl = KLTerm(beta=beta, estimator=KLNaive()) if beta else None
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean(), kl=kl)
    ours = library_loss(objective, logp, old, reference, advantage, mask)
    theirs = nano.policy_loss(logp, old, advantage, mask)
    theirs = theirs + beta * nano.kl_loss(logp, reference, mask)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    assert gradients[1].norm() > 0.01
    assert not gradients[1][~mask].any()


def test_the_kl_value_is_that_of_the_library(nano):
    logp, old, reference, advantage, mask = case(7)
    kl = KLTerm(beta=1.0, estimator=KLNaive())
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean(), kl=kl)
    none = torch.zeros_like(advantage)
    ours = library_loss(objective, logp, old, reference, none, mask)
    assert Coefficients(kl=1.0) == objective.coefficients
    assert float(ours.detach()) == pytest.approx(
        float(nano.kl_loss(logp, reference, mask).detach()), abs=1e-12
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities(nano, tiny_folder, temperature):
    """Left-padded prompts there, right-padded rows here."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ours = load(str(tiny_folder)).model
    prompts = [(65, 66, 67), (68,), (69, 70)]
    tokens = torch.tensor([[71, 72, 73, 74], [75, 76, 0, 0], [77, 78, 79, 0]])
    length = torch.tensor([4, 2, 3])
    mask = torch.arange(4) < length[:, None]
    left = [[0] * (3 - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (3 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = torch.cat([torch.tensor(left), tokens], dim=1)
    attention = torch.cat([torch.tensor(seen), mask.long()], dim=1)
    with torch.no_grad():
        expected = nano.completion_logp(theirs, ids, attention, 3, temperature)
        scored = completion_logp(ours, prompts, tokens, length, temperature=temperature)
    # without position ids the padded rows start later; rotary positions are relative
    assert (scored.logp - expected)[mask].abs().max() < 2e-5
