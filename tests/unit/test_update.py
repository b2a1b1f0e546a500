"""Optimizer steps: what is passed forward, what is summed, and that the split changes nothing."""

import dataclasses
import math

import pytest
import torch

from gruppo.metric import reduce
from gruppo.objective import (
    Coefficients,
    Grpo,
    LocalTokenMean,
    Objective,
    PpoClip,
    TokenMean,
    TokenTruncate,
)
from gruppo.policy import Policy
from gruppo.settings import UpdateSettings
from gruppo.types import Evidence
from gruppo.update import (
    OptimizerStep,
    Targets,
    gather_evidence,
    micro_batches,
    update,
)
from support.update_steps import named, policy_of, rollout, targets_of, wide_model


@pytest.fixture(scope="module")
def model(tiny_folder):
    return wide_model(tiny_folder)


CORRECTED = Objective(
    credit=Grpo(), surrogate=PpoClip(), weights=TokenMean(), correction=TokenTruncate(max=2.0)
)
OBJECTIVES = {
    **{name: named(name) for name in ("default", "gspo", "dr_grpo", "grpo", "tokens_80_20")},
    **{name: named(name) for name in ("gmpo", "kl_cov", "clip_cov")},
    "corrected": CORRECTED,
}


def gradient(policy, objective, batch, *, budget=8192, skip_dead=True, updates=1) -> torch.Tensor:
    """The gradient of one optimizer step over all rows of ``batch``."""
    settings = UpdateSettings(
        tokens_per_microbatch=budget, skip_dead=skip_dead, inner_epochs=updates
    )
    targets = targets_of(policy, objective, batch, settings)
    step = OptimizerStep(policy, objective, targets, objective.coefficients, settings)
    step.accumulate(torch.arange(12), first=True)
    parts = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    policy.discard_gradient()
    return torch.cat(parts) if parts else torch.zeros(0)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_does_not_depend_on_the_split(model, name, updates):
    objective = OBJECTIVES[name]
    reference = "copy" if objective.needs_reference else "none"
    packed = policy_of(model, reference=reference)
    plain = policy_of(model, packed=False, reference=reference)
    whole = gradient(packed, objective, rollout(), updates=updates)
    assert whole.norm() > 1e-3
    for policy in (packed, plain):
        for budget in (8192, 40, 1):
            split = gradient(policy, objective, rollout(), budget=budget, updates=updates)
            assert (split - whole).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["default", "dr_grpo", "gspo", "corrected", "bnpo"])
def test_skipping_dead_groups_changes_no_gradient(model, name):
    objective = OBJECTIVES.get(name) or named(name)
    policy = policy_of(model)
    kept = gradient(policy, objective, rollout(), skip_dead=False, budget=20)
    skipped = gradient(policy, objective, rollout(), skip_dead=True, budget=20)
    assert (kept - skipped).abs().max() < 1e-12


@dataclasses.dataclass
class Passes:
    """Counts the rows that a policy scores, and which."""

    monkeypatch: pytest.MonkeyPatch
    logp: int = 0
    old_logp: int = 0
    ref_logp: int = 0
    steps: list = dataclasses.field(default_factory=lambda: [[]])

    def __post_init__(self):
        for name in ("logp", "old_logp", "ref_logp"):
            self.watch(name)
        step = Policy.step

        def counted(policy):
            self.steps.append([])
            return step(policy)

        self.monkeypatch.setattr(Policy, "step", counted)

    def watch(self, name):
        real = getattr(Policy, name)

        def counted(policy, prompts, tokens, length, **how):
            setattr(self, name, getattr(self, name) + len(length))
            if name == "logp":
                self.steps[-1] += prompts
            return real(policy, prompts, tokens, length, **how)

        self.monkeypatch.setattr(Policy, name, counted)

    @property
    def rows(self):
        return {"logp": self.logp, "old": self.old_logp, "ref": self.ref_logp}


@pytest.mark.parametrize(
    ("name", "minibatches", "rows"),
    [
        ("default", 1, {"logp": 7, "old": 0, "ref": 0}),
        # of the minibatch without signal, one row for a gradient of zero
        ("default", 3, {"logp": 8, "old": 12, "ref": 0}),
        ("grpo", 1, {"logp": 12, "old": 0, "ref": 12}),  # the KL term acts on every row
        ("rloo", 1, {"logp": 7, "old": 12, "ref": 12}),  # the credit reads both
        ("tokens_80_20", 1, {"logp": 12, "old": 12, "ref": 0}),  # for the selection
    ],
)
def test_only_the_passes_that_are_needed_are_made(model, name, minibatches, rows, monkeypatch):
    objective = named(name)
    reference = "copy" if objective.needs_reference else "none"
    policy = policy_of(model, reference=reference, lr=0.0)
    passes = Passes(monkeypatch)
    settings = UpdateSettings(minibatches=minibatches, tokens_per_microbatch=30)
    targets = targets_of(policy, objective, rollout(), settings)
    update(policy, objective, targets, coefficients=objective.coefficients, settings=settings)
    assert passes.rows == rows


def test_rows_that_may_have_a_gradient_are_not_skipped(model, monkeypatch):
    policy = policy_of(model, reference="copy", lr=0.0)
    passes = Passes(monkeypatch)
    objective, settings = named("default"), UpdateSettings()
    targets = targets_of(policy, objective, rollout())
    for coefficients, rows in (
        (Coefficients(), 7),
        (Coefficients(entropy=0.01), 12),
        (Coefficients(kl=0.01), 12),
    ):
        passes.logp = 0
        update(policy, objective, targets, coefficients=coefficients, settings=settings)
        assert passes.logp == rows


def test_stale_rows_have_the_engines_log_probabilities_as_old_ones(model):
    policy, batch = policy_of(model), rollout()
    batch.engine_logp[4, 1] = math.nan
    stale = [row in (4, 9) for row in range(12)]
    fresh = policy.old_logp(
        [batch.prompts[g] for g in batch.group], batch.tokens, batch.length
    ).logp
    old = gather_evidence(policy, named("default"), batch, UpdateSettings(), stale=stale).old_logp
    assert torch.equal(old[9], batch.engine_logp[9].double())
    assert torch.equal(old[4, [0, 2, 3]], batch.engine_logp[4, [0, 2, 3]].double())
    assert old[4, 1] == pytest.approx(float(fresh[4, 1]), abs=1e-12)  # the engine gave none
    assert (old[~torch.tensor(stale)] - fresh[~torch.tensor(stale)]).abs().max() < 1e-12
    nothing = gather_evidence(policy, named("default"), batch, UpdateSettings())
    assert (nothing.old_logp, nothing.ref_logp) == (None, None)


def test_minibatches_hold_whole_groups_and_every_row_once_an_epoch(model, monkeypatch):
    batch = rollout(rewards=tuple(float(row % 2) for row in range(12)))
    settings = UpdateSettings(inner_epochs=4, minibatches=2)
    evidence = Evidence(old_logp=torch.zeros(12, 7))
    targets = Targets(rollout=batch, evidence=evidence, advantage=torch.ones(12))
    passes = Passes(monkeypatch)
    update(
        policy_of(model, lr=0.0),
        named("default"),
        targets,
        coefficients=Coefficients(),
        settings=settings,
    )
    steps = passes.steps[:-1]
    assert len(steps) == settings.num_updates == 8
    assert [len(step) for step in steps] == [8, 4] * 4  # three groups: two, and one
    for step in steps:
        assert all(step.count(prompt) == 4 for prompt in step)
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert set(first) | set(second) == set(batch.prompts)
    orders = {frozenset(step) for step in steps[::2]}
    assert len(orders) > 1  # every epoch is shuffled anew


def test_bnpo_depends_on_the_split_as_it_should(model):
    """Rows of 5, 2, 7 (less a hole) and 1 tokens: c = (rows here / 4) / (tokens here)."""
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=LocalTokenMean())
    batch = rollout()
    targets = Targets(rollout=batch, evidence=Evidence(), advantage=torch.ones(12))
    policy = policy_of(model, packed=False)
    losses = {}
    for budget in (10**6, 20, 1):
        settings = UpdateSettings(tokens_per_microbatch=budget)
        step = OptimizerStep(policy, objective, targets, Coefficients(), settings)
        batch.total[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        targets.advantage[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        seen = reduce(step.accumulate(torch.arange(4), first=True))
        losses[budget] = seen["loss/policy"]
        policy.discard_gradient()
    tokens, advantages = (5, 2, 6, 1), (1.0, 2.0, 3.0, 4.0)
    whole = -sum(n * a for n, a in zip(tokens, advantages, strict=True)) / 14
    alone = -sum(advantages) / 4
    # 20 positions: rows of 3 + 7 and 3 + 5 tokens together (2 x 10), then 3 + 2 and 3 + 1
    halves = -(2 / 4) * (6 * 3.0 + 5 * 1.0) / 11 - (2 / 4) * (2 * 2.0 + 1 * 4.0) / 3
    assert losses[10**6] == pytest.approx(whole, abs=1e-12)
    assert losses[1] == pytest.approx(alone, abs=1e-12)
    assert losses[20] == pytest.approx(halves, abs=1e-12)


def test_micro_batches_keep_to_the_budget():
    batch = rollout()
    packed = [part.tolist() for part in micro_batches(batch, range(12), 20, packed=True)]
    # prompt once: 3 + 5 + 2 + 7 + 1 = 18; 6 + 4 + 3 + 6 = 19; 6 + 6 and 2 + 2 + 3 more = 19 ...
    assert packed == [[0, 1, 2, 3], [4, 5, 6], [7, 8], [9, 10, 11]]
    plain = [part.tolist() for part in micro_batches(batch, range(12), 25, packed=False)]
    # by size: 12 12 10 10 9 8 7 7 5 5 4 4 3 (rows times the longest)
    assert plain == [[6, 7], [2, 4], [5, 0], [9, 1, 11], [3, 8, 10]]
    assert [part.tolist() for part in micro_batches(batch, [2, 0], 1, packed=False)] == [[2], [0]]
    assert list(micro_batches(batch, [], 9, packed=True)) == []


@pytest.mark.parametrize("skip_dead", [True, False])
@pytest.mark.parametrize("rewards", [(0.5,) * 12, (math.nan,) * 12])
def test_a_batch_without_signal_moves_nothing(tiny_folder, skip_dead, rewards):
    policy = policy_of(wide_model(tiny_folder))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    objective, settings = named("default"), UpdateSettings(skip_dead=skip_dead)
    targets = targets_of(policy, objective, rollout(rewards))
    result = update(policy, objective, targets, coefficients=Coefficients(), settings=settings)
    assert [report.skipped for report in result.reports] == [False]
    assert result.reports[0].grad_norm == 0.0
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name])
    values = reduce(result.metrics)
    assert [name for name, value in values.items() if math.isnan(value)] == []


def test_an_empty_batch_is_a_step_without_rows(model):
    batch = rollout()
    none = torch.zeros(0, dtype=torch.long)
    empty = dataclasses.replace(
        batch,
        prompts=(),
        tokens=batch.tokens[none, :0],
        mask=batch.mask[none, :0],
        engine_logp=batch.engine_logp[none, :0],
        group=none,
        total=batch.total[none],
        task=batch.task[none],
        parts=batch.parts[none],
        length=none,
        truncated=batch.truncated[none],
        steps=(),
    )
    policy = policy_of(model, lr=0.0)
    for name in ("default", "grpo", "tokens_80_20"):
        objective, settings = named(name), UpdateSettings(minibatches=2)
        policy = policy_of(model, reference="copy" if objective.needs_reference else "none", lr=0.0)
        targets = targets_of(policy, objective, empty, settings)
        result = update(policy, objective, targets, coefficients=Coefficients(), settings=settings)
        assert result.metrics == {}
        assert [report.grad_norm for report in result.reports] == [0.0, 0.0]


def test_before_step_is_called_before_each_change_of_weights(model):
    policy = policy_of(model, lr=0.0)
    objective, settings = named("default"), UpdateSettings(inner_epochs=3)
    versions = []
    targets = targets_of(policy, objective, rollout(), settings)
    result = update(
        policy,
        objective,
        targets,
        coefficients=Coefficients(),
        settings=settings,
        before_step=lambda: versions.append(policy.version),
    )
    assert versions == [0, 1, 2]
    assert [report.lr for report in result.reports] == [0.0, 0.0, 0.0]
