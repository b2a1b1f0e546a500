"""The training loop: control, evaluation, stops and faults, on the tiny model."""

import dataclasses

import pytest
import torch

import gruppo.update
from gruppo.budget import Budget
from gruppo.errors import NumericError, ServiceError
from gruppo.evaluate import EVAL_KEY
from gruppo.objective import (
    AdaptiveEntropy,
    AdaptiveKL,
    EntropyTerm,
    KLTerm,
)
from gruppo.policy import Policy
from gruppo.train import train
from support.runs import (
    PLAIN,
    WITH_KL,
    lowness,
    run_of,
    scripted,
)

# Control --------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_law(tiny_folder):
    law = AdaptiveKL(target=0.01, horizon=100)
    run = run_of(tiny_folder, dataclasses.replace(WITH_KL, kl=KLTerm(beta=0.1, adaptive=law)))
    outcome = train(run)
    beta = 0.1
    for step in range(1, 5):
        seen = run.keeper.metrics[step]
        assert seen["kl/beta"] == beta
        assert (seen["data/epoch"], seen["data/prompts_dropped"]) == (2 * step / 8, 0.0)
        error = min(max(seen["kl/ref_k3"] / 0.01 - 1, -0.2), 0.2)
        beta = beta * (1 + error * 10 / 100)  # ten rows a step
    assert outcome.state.coefficients.kl == beta != 0.1


def test_the_entropy_coefficient_follows_its_law(tiny_folder):
    law = AdaptiveEntropy(target=5.541, delta=0.01)
    term = EntropyTerm(coef=0.005, adaptive=law)
    run = run_of(tiny_folder, dataclasses.replace(PLAIN, entropy=term), steps=8)
    train(run)
    alpha, applied = 0.005, 0.0
    sides = set()
    for step in range(1, 9):
        seen = run.keeper.metrics[step]
        assert seen["entropy/coef"] == applied
        low = seen["entropy/mean"] <= 5.541
        sides.add(low)
        alpha = min(max(alpha + (0.01 if low else -0.01), 0.0), 1.0)
        applied = alpha if low else 0.0
    assert sides == {True, False}  # it starts at ln 258 = 5.55 and falls


def test_the_reference_is_moved_on_its_days(tiny_folder):
    run = run_of(tiny_folder, WITH_KL, steps=5, reference_sync_steps=2, reference_mixup=0.25)
    reference = {
        f"reference.{n}": p.detach().clone() for n, p in run.policy.model.named_parameters()
    }
    train(run)
    for step in range(1, 6):
        kept = run.keeper.weights[step]
        if step % 2 == 0:
            for name, old in reference.items():
                live = kept[name.replace("reference.", "model.")]
                reference[name] = torch.lerp(old, live, 0.25)
        held = {name: tensor for name, tensor in kept.items() if name.startswith("reference.")}
        assert sorted(held) == (sorted(reference) if step >= 2 else [])
        assert all(torch.equal(tensor, reference[name]) for name, tensor in held.items())
    moved = {step: m["ref/updates"] for step, m in run.keeper.metrics.items() if "ref/updates" in m}
    assert moved == {2: 1.0, 4: 2.0}


# Evaluation and the end -----------------------------------------------------------------------


def test_evaluations_best_step_and_patience(tiny_folder):
    evaluator = scripted([1, 2, 2, 1], every=2, patience=2)
    run = run_of(tiny_folder, evaluator=evaluator, steps=12)
    outcome = train(run)
    assert run.keeper.evaluated == [(0, 0.25), (2, 0.5), (4, 0.5), (6, 0.25)]
    assert (outcome.ended_by, outcome.state.step) == ("patience", 6)
    assert (outcome.state.best, outcome.state.best_step) == (0.5, 2)
    assert list(run.keeper.saved) == [2, 6]  # the best one, and the end
    assert (outcome.before.metrics["pass@1"], outcome.after.metrics["pass@1"]) == (0.25, 0.25)


def test_evaluation_before_and_after_only(tiny_folder):
    run = run_of(tiny_folder, evaluator=scripted([0, 4], every=0), due=(3,))
    outcome = train(run)
    assert run.keeper.evaluated == [(0, 0.0), (4, 1.0)]
    assert (outcome.ended_by, list(run.keeper.saved)) == ("steps", [3, 4])


class Clock:
    """Seconds that pass where a test lets them."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def timed(tiny_folder, *, limit, save, evaluation=None, due=()):
    """A run taken up 7 s ago whose steps take 10 s; returns it and its clock."""
    clock = Clock(107.0)
    evaluator = None if evaluation is None else scripted([1, 1], every=0)
    run = run_of(tiny_folder, steps=9, time_limit_s=limit, due=due, evaluator=evaluator)
    run = dataclasses.replace(run, budget=Budget(began=100.0, clock=clock))
    costs = {0: 10.0, EVAL_KEY: evaluation}
    run.engine.hook = lambda key: clock.passes(costs.get(key, 0.0))
    run.keeper.on_save = lambda step: clock.passes(save)
    return run, clock


@pytest.mark.parametrize(("limit", "steps"), [(46, 2), (47, 3), (56, 3), (57, 4)])
def test_the_time_limit_holds_the_last_save(tiny_folder, limit, steps):
    """7 s of loading, n steps of 10 s, a save after the first and one at the end of 5 s."""
    run, clock = timed(tiny_folder, limit=limit, save=5.0, due=(1,))
    outcome = train(run)
    assert (outcome.ended_by, outcome.state.step) == ("time", steps)
    assert clock.now - 100 == 7 + 5 + 10 * steps + 5 <= limit
    assert list(run.keeper.saved) == [1, steps]
    assert {m["time/step"] for m in run.keeper.metrics.values()} == {10.0}


def test_a_save_never_made_is_reserved_as_long_as_a_step(tiny_folder):
    run, clock = timed(tiny_folder, limit=46, save=9.0)
    assert train(run).state.step == 2  # 27 + 10 + 10 > 46
    assert clock.now - 100 == 36.0


@pytest.mark.parametrize(("limit", "steps"), [(72, 2), (73, 3)])
def test_the_time_limit_holds_the_evaluations(tiny_folder, limit, steps):
    run, clock = timed(tiny_folder, limit=limit, save=6.0, evaluation=13.0)
    outcome = train(run)  # 7 + 13 + 3 steps, then a save (reserved as a step) and 13
    assert (outcome.ended_by, outcome.state.step) == ("time", steps)
    assert clock.now - 100 == 7 + 13 + 10 * steps + 6 + 13 <= limit
    assert [step for step, _ in run.keeper.evaluated] == [0, steps]


def test_a_limit_that_loading_used_up_trains_nothing_and_saves(tiny_folder):
    run, _ = timed(tiny_folder, limit=6, save=1.0)
    outcome = train(run)
    assert (outcome.ended_by, outcome.state.step, list(run.keeper.saved)) == ("time", 0, [0])


def test_plain_functions_are_told_of_steps_and_evaluations(tiny_folder):
    steps, evaluations = [], []

    def callback(step, groups, metrics):
        steps.append((step, len(groups), metrics["reward/total_mean"] > 0))

    def listener(step, metrics):
        evaluations.append((step, metrics["pass@1"]))

    run = run_of(tiny_folder, evaluator=scripted([1, 2, 4], every=2))
    train(dataclasses.replace(run, callbacks=(callback,), listeners=(listener,)))
    assert steps == [(n, 2, True) for n in (1, 2, 3, 4)]
    assert evaluations == [(0, 0.25), (2, 0.5), (4, 1.0)]


def test_a_step_with_fewer_groups_than_asked_for_is_marked(tiny_folder):
    """Of every two problems one has rewards that differ, and there is one batch to find two in."""

    def reward(problem, completions):
        graded.append(problem)
        return [float(len(graded) % 2 == row == 1) for row in range(len(completions))]

    graded = []
    run = run_of(tiny_folder, reward=reward, steps=2)
    run.rollouts.settings = dataclasses.replace(
        run.rollouts.settings, filter="resample", max_gen_batches=1
    )
    train(run)
    assert [m["group/partial"] for m in run.keeper.metrics.values()] == [1.0, 1.0]
    plain = run_of(tiny_folder, steps=1)
    train(plain)
    assert plain.keeper.metrics[1]["group/partial"] == 0.0


DOCUMENTED = """
reward/total_mean reward/low_mean reward/low_std reward/low_null_frac reward/total_std_between
reward/total_std_within group/zero_std_frac group/solve_all_frac group/solve_none_frac
group/unique_frac adv/abs_max adv/group_sum_abs_max len/mean len/p95 len/mean_correct
len/mean_wrong len/terminated_mean trunc/frac entropy/mean ratio/mean ratio/max ratio/min
ratio/first_minibatch_maxdev clip/low clip/high policy/kl_old_k3 kl/ref_k3 is/mismatch_k1
is/mismatch_k3 is/ess is/max_prob_diff is/prob_correlation async/staleness_mean
async/staleness_max data/epoch data/prompts_dropped optim/grad_norm
optim/lr optim/update_ratio health/skipped_steps tokens/live_frac rep/frac reward/unscored_frac
time/step time/sampling tokens/sampled group/pass@1
"""


def test_every_documented_metric_is_there(tiny_folder):
    run = run_of(tiny_folder, WITH_KL, steps=1)
    train(run)
    seen = run.keeper.metrics[1]
    assert set(DOCUMENTED.split()) - seen.keys() == set()
    assert seen["ratio/first_minibatch_maxdev"] == 0.0
    assert (seen["async/staleness_max"], seen["is/ess"]) == (0.0, pytest.approx(1.0, abs=1e-6))


# Faults ---------------------------------------------------------------------------------------


class Poison:
    """NaN in one place of the training pass, while ``active``."""

    active = False

    def logits(self, monkeypatch):
        real = Policy.logp

        def broken(policy, *rows, **how):
            scored = real(policy, *rows, **how)
            bad = scored.logp + float("nan") if self.active else scored.logp
            return dataclasses.replace(scored, logp=bad)

        monkeypatch.setattr(Policy, "logp", broken)

    def loss(self, monkeypatch):
        real = gruppo.update.compute_loss

        def broken(*parts):
            loss = real(*parts)
            return dataclasses.replace(
                loss, value=loss.value * (float("inf") if self.active else 1)
            )

        monkeypatch.setattr(gruppo.update, "compute_loss", broken)

    def gradient(self, monkeypatch):
        real = Policy.backward

        def broken(policy, loss):
            real(policy, loss)
            if self.active:
                next(policy.model.parameters()).grad[0, 0] = float("nan")

        monkeypatch.setattr(Policy, "backward", broken)


@pytest.mark.parametrize("place", ["logits", "loss", "gradient"])
def test_three_steps_that_are_not_finite_end_the_run(tiny_folder, monkeypatch, place):
    poison = Poison()
    getattr(poison, place)(monkeypatch)
    run = run_of(tiny_folder, steps=9)
    run.keeper.on_step = lambda step: setattr(poison, "active", step >= 2)
    with pytest.raises(NumericError, match=r"3 steps in a row \(last: step 5\)"):
        train(run)
    assert run.policy.version == 2
    for step in (3, 4, 5):
        assert run.keeper.metrics[step]["health/skipped_steps"] == 1.0
        for name, tensor in run.keeper.weights[2].items():
            assert torch.equal(tensor, run.keeper.weights[step][name])
    assert run.keeper.dumped == [(2, 10), (3, 10), (4, 10)]


def test_a_single_one_is_left_out_and_kept(tiny_folder, monkeypatch):
    poison = Poison()
    poison.gradient(monkeypatch)
    run = run_of(tiny_folder, steps=5)
    run.keeper.on_step = lambda step: setattr(poison, "active", step == 2)
    assert train(run).state.step == 5
    skipped = {step: m["health/skipped_steps"] for step, m in run.keeper.metrics.items()}
    assert skipped == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0, 5: 0.0}
    assert (run.keeper.dumped, run.policy.version) == ([(2, 10)], 4)
    name = "model.model.layers.0.mlp.up_proj.weight"
    kept = run.keeper.weights
    assert torch.equal(kept[2][name], kept[3][name])
    assert not torch.equal(kept[3][name], kept[4][name])


def test_a_model_that_gives_nan_is_a_numeric_error(tiny_folder):
    run = run_of(tiny_folder)
    with torch.no_grad():
        next(run.policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericError, match=r"after step 0: .*logits"):
        train(run)


@pytest.mark.parametrize(("unscored", "ends"), [(1, False), (2, True)])
def test_a_reward_that_often_fails_ends_the_run(tiny_folder, unscored, ends):
    """One of five is 20 %, which is borne; two are not."""

    def reward(problem, completions):
        return [None] * unscored + lowness(problem, completions[unscored:])

    run = run_of(tiny_folder, reward=reward)
    if ends:
        with pytest.raises(ServiceError, match="could not be scored in 3 steps"):
            train(run)
        assert list(run.keeper.saved) == [3]
    else:
        assert train(run).state.step == 4
    assert run.keeper.metrics[1]["reward/unscored_frac"] == unscored / 5
