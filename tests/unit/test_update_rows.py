"""Optimizer steps: rows left out, steps without signal, and what an entropy costs."""

import math
from dataclasses import replace

import pytest
import torch

from gruppo.metric import reduce
from gruppo.model import fused
from gruppo.objective import (
    AdaptiveEntropy,
    AdaptiveKL,
    Coefficients,
    EntropyTerm,
    Gmpo,
    Grpo,
    Gspo,
    GspoToken,
    KLTerm,
    Live,
    Luspo,
    Objective,
    PpoClip,
    RlooSeq,
    SeqMeanTokenMean,
    SequenceMask,
    TokenMean,
    Totals,
    compute_loss,
    make_rows,
    mismatch,
)
from gruppo.policy import Optim, Policy
from gruppo.settings import UpdateSettings
from gruppo.update import OptimizerStep, live_metrics, row_metrics, update
from support.update_steps import named, policy_of, rollout, targets_of, wide_model

DEAD = (0.5,) * 12


def stepped(policy, *batches, skip_dead):
    """Optimizer steps over the batches, one each; the weights after them."""
    objective, settings = named("default"), UpdateSettings(skip_dead=skip_dead)
    for batch in batches:
        targets = targets_of(policy, objective, batch, settings)
        update(policy, objective, targets, coefficients=Coefficients(), settings=settings)
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def with_an_idle_head(folder):
    """A model with a trainable weight that no forward pass reaches."""
    model = wide_model(folder)
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float64)))
    return model


@pytest.mark.parametrize("batches", [[DEAD], [None, DEAD]])
def test_a_step_without_signal_leaves_weights_alone_that_no_row_reaches(tiny_folder, batches):
    """As one whose rows are passed forward does, with weight decay and from the first step."""
    policies = {}
    for skip_dead in (True, False):
        policy = policies[skip_dead] = Policy(
            with_an_idle_head(tiny_folder),
            optim=Optim(lr=1e-3, warmup_steps=0, weight_decay=0.5),
            total_updates=10,
            compute_dtype=torch.float64,
        )
        stepped(policy, *(rollout(b) if b else rollout() for b in batches), skip_dead=skip_dead)
        assert torch.equal(policy.model.idle, torch.ones(3, 3, dtype=torch.float64))
    skipped, kept = policies[True].state()[0], policies[False].state()[0]
    assert skipped.keys() == kept.keys()  # the moments: of all weights but the idle one
    assert "optim.step.model.embed_tokens.weight" in skipped
    assert "optim.step.idle" not in skipped
    assert max((skipped[name] - kept[name]).abs().max().item() for name in kept) < 1e-12


def test_a_step_without_signal_moves_by_momentum_whether_its_rows_are_skipped_or_not(tiny_folder):
    """AdamW after one step of gradient g and one of gradient 0, bit for bit the same."""
    live, dead = rollout(), rollout(DEAD)
    first = stepped(policy_of(wide_model(tiny_folder)), live, skip_dead=True)
    kept, skipped = policy_of(wide_model(tiny_folder)), policy_of(wide_model(tiny_folder))
    with_rows = stepped(kept, live, dead, skip_dead=False)
    without = stepped(skipped, live, dead, skip_dead=True)
    assert (with_rows - without).abs().max() < 1e-12
    assert (without - first).abs().max() > 1e-4  # lr = 1e-3: the moments' share
    assert kept.version == skipped.version == 2
    for tensors in (kept.state()[0], skipped.state()[0]):
        assert {float(t) for name, t in tensors.items() if ".step." in name} == {2.0}


def test_a_parameter_without_gradient_gets_one_of_zero_only_if_it_is_trained(tiny_folder):
    policy = policy_of(wide_model(tiny_folder))
    frozen = policy.model.get_input_embeddings().weight.requires_grad_(False)
    objective, settings = named("default"), UpdateSettings()
    targets = targets_of(policy, objective, rollout(DEAD))
    OptimizerStep(policy, objective, targets, Coefficients(), settings).accumulate(
        torch.arange(12), first=True
    )
    assert frozen.grad is None
    grads = [p.grad for p in policy.model.parameters() if p is not frozen]
    assert [float(g.abs().max()) for g in grads] == [0.0] * len(grads)


@pytest.mark.parametrize(
    ("term", "rows"),
    [
        ({}, 7),
        ({"entropy": EntropyTerm(coef=0.0)}, 7),
        ({"entropy": EntropyTerm(adaptive=AdaptiveEntropy())}, 12),
        ({"kl": KLTerm(beta=0.1, adaptive=AdaptiveKL(target=0.1))}, 12),
    ],
)
def test_a_controller_sees_every_row_though_its_coefficient_is_zero_now(
    tiny_folder, monkeypatch, term, rows
):
    """Skipped rows would make it measure another entropy than under filter = "keep"."""
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean(), **term)
    seen = []
    logp = Policy.logp

    def counted(policy, prompts, tokens, length, **how):
        seen.append(len(length))
        return logp(policy, prompts, tokens, length, **how)

    monkeypatch.setattr(Policy, "logp", counted)
    means = []
    for skip_dead in (True, False):
        policy = policy_of(wide_model(tiny_folder), reference="copy", lr=0.0)
        settings = UpdateSettings(skip_dead=skip_dead)
        targets = targets_of(policy, objective, rollout())
        result = update(policy, objective, targets, coefficients=Coefficients(), settings=settings)
        means.append(reduce(result.metrics)["entropy/mean"])
    assert seen == [rows, 12]
    assert (means[0] == pytest.approx(means[1], abs=1e-12)) == (rows == 12)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_entropy_is_differentiated_only_for_an_entropy_term(tiny_folder, monkeypatch, alpha):
    """With α = 0 it is logged, and gradients are to the bit those of a pass without entropy."""
    policy, objective = policy_of(wide_model(tiny_folder)), named("default")
    targets, arrived = targets_of(policy, objective, rollout()), []
    backward = fused.FusedHead.backward

    def watched(ctx, grad_logp, grad_entropy):
        arrived.append(None if grad_entropy is None else float(grad_entropy.sum()))
        return backward(ctx, grad_logp, grad_entropy)

    monkeypatch.setattr(fused.FusedHead, "backward", staticmethod(watched))

    def gradient(coefficients):
        step = OptimizerStep(policy, objective, targets, coefficients, UpdateSettings())
        seen = reduce(step.accumulate(torch.arange(12), first=True))
        grads = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
        policy.discard_gradient()
        return seen["entropy/mean"], grads

    entropy, grads = gradient(Coefficients(entropy=alpha))
    assert 5.4 < entropy < math.log(258)  # a random model is close to uniform
    if alpha:
        # -α · Σ c · ∂H: c = 1/N of each trained token, unscored and dead ones too
        assert arrived == [pytest.approx(-alpha, abs=1e-12)]
        assert (grads - gradient(Coefficients())[1]).abs().max() > 1e-6
        return
    assert arrived == [None]
    logp = Policy.logp

    def without(policy, prompts, tokens, length, *, entropy):
        scored = logp(policy, prompts, tokens, length, entropy=False)
        return type(scored)(logp=scored.logp, entropy=torch.zeros_like(scored.logp))

    monkeypatch.setattr(Policy, "logp", without)
    plain_entropy, plain = gradient(Coefficients())
    assert plain_entropy == 0.0
    assert torch.equal(grads, plain)


def step_of(surrogate, logp, old, advantage, mask):
    """Loss and rows of one group under the weights 1/(B n)."""
    objective = Objective(credit=Grpo(), surrogate=surrogate, weights=SeqMeanTokenMean())
    group = torch.zeros(len(mask), dtype=torch.long)
    rows = make_rows(
        objective,
        advantage=torch.tensor(advantage, dtype=torch.float64),
        mask=mask,
        group=group,
        scored=torch.ones(len(mask), dtype=torch.bool),
        old_logp=old,
        engine_logp=old,
        ref_logp=None,
        totals=Totals.of(mask, group),
        selected=None,
    )
    live = Live(logp=logp, entropy=None, mask=mask)
    return compute_loss(objective, live, rows, Coefficients()), rows


@pytest.mark.parametrize(
    ("surrogate", "share"),
    [
        # log-ratios: means .1, -.1, .1, 0 of A = 1, -1, -1, 1: the first two leave the range
        (Gspo(eps_low=0.05, eps_high=0.05), 2 / 4),
        (GspoToken(eps_low=0.05, eps_high=0.05), 2 / 4),
        (Luspo(eps_low=0.05, eps_high=0.15), 1 / 4),
        (RlooSeq(eps_low=0.5, eps_high=0.2), 1 / 4),  # sums .2, -.2, .1, 0
        (Gmpo(eps_low=0.15, eps_high=0.4), 1 / 4),  # of row 1 a token at -.2
    ],
)
def test_clipped_rows_are_a_share_of_the_trained_rows(surrogate, share):
    d = [[0.1, 0.1], [-0.2, 0.0], [0.1, 9.0], [0.3, -0.3], [5.0, 5.0]]
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True], [False, False]])
    old = torch.full((5, 2), -3.0, dtype=torch.float64)
    logp = old + torch.tensor(d, dtype=torch.float64)
    loss, rows = step_of(surrogate, logp, old, [1.0, -1.0, -1.0, 1.0, 1.0], mask)
    assert reduce(row_metrics(loss, rows)) == {"clip/rows": pytest.approx(share, abs=1e-12)}


@pytest.mark.parametrize(
    ("name", "logged"),
    [("gspo", True), ("gspo_token", True), ("gmpo", True), ("default", False), ("vespo", False)],
)
def test_clipped_rows_are_logged_for_losses_that_clip_the_ratio_of_rows(tiny_folder, name, logged):
    policy, objective = policy_of(wide_model(tiny_folder)), named(name)
    targets = targets_of(policy, objective, rollout())
    step = OptimizerStep(policy, objective, targets, Coefficients(), UpdateSettings())
    seen = reduce(step.accumulate(torch.arange(12), first=True))
    assert ("clip/rows" in seen) == logged
    assert seen.get("clip/rows", 0.0) == 0.0  # on-policy nothing is clipped


def test_rejections_in_the_longest_tenth_of_the_rows_are_logged_whatever_the_split(tiny_folder):
    """A ratio of whole completions grows with their length, so these are the first to go."""
    policy, batch = policy_of(wide_model(tiny_folder)), rollout()
    correction = SequenceMask(max=2.0)
    plain = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())
    objective = replace(plain, correction=correction)
    prompts = [batch.prompts[int(group)] for group in batch.group]
    live = policy.old_logp(prompts, batch.tokens, batch.length).logp
    _, keep = correction(live, batch.engine_logp.double(), batch.mask)
    longest = (batch.length >= 7)[:, None] & batch.mask  # lengths are 1 to 7
    assert 0 < longest.any(dim=1).sum() < 4
    expected = (~keep)[longest].double().mean().item()
    for tokens in (20, 10_000):
        settings = UpdateSettings(tokens_per_microbatch=tokens, skip_dead=False)
        targets = targets_of(policy, objective, batch, settings)
        step = OptimizerStep(policy, objective, targets, Coefficients(), settings)
        seen = reduce(step.accumulate(torch.arange(12), first=True))
        policy.discard_gradient()
        assert seen["is/rejected_frac_longest"] == pytest.approx(expected, abs=1e-6)
        assert 0 < seen["is/rejected_frac"] < 1
    step = OptimizerStep(policy, plain, targets, Coefficients(), settings)
    assert "is/rejected_frac_longest" not in step.accumulate(torch.arange(12), first=True)


def test_logged_mismatch_is_that_of_the_reference_formulas():
    """The engine gave every token, and no weight exceeds the cap."""
    draw = torch.Generator().manual_seed(3)
    old = -torch.rand(6, 5, generator=draw, dtype=torch.float64)
    engine = old + 0.2 * torch.randn(6, 5, generator=draw, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=draw) < 0.8
    expected = mismatch(old, engine, mask, cap=10.0)
    _, rows = step_of(PpoClip(), old, old, [1.0] * 6, mask)
    rows = replace(rows, engine_logp=engine)
    live = Live(logp=old, entropy=None, mask=mask)
    seen = reduce(live_metrics(live, rows))
    assert seen["is/mismatch_k1"] == pytest.approx(expected["mismatch_k1"], abs=1e-12)
    assert seen["is/mismatch_k3"] == pytest.approx(expected["mismatch_k3"], abs=1e-12)
    assert seen["is/max_prob_diff"] == pytest.approx(expected["max_abs_prob_diff"], abs=1e-12)
    assert seen["is/prob_correlation"] == pytest.approx(expected["prob_correlation"], abs=1e-12)
    ess = seen["is/_weight"] ** 2 / seen["is/_weight_squared"]
    assert ess == pytest.approx(expected["ess"], abs=1e-12)
    assert seen["is/_weight_squared"] - 1 == pytest.approx(expected["chi2_token"], abs=1e-12)
