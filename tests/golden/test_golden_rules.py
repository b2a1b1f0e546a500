"""Golden rules around the objective: controllers, staleness, filters, masks, evaluation, theory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gruppo.objective.batch import accumulation_steps, optimizer_steps, rows_per_rollout
from gruppo.objective.composition import Objective
from gruppo.objective.control import AdaptiveEntropy, AdaptiveKL, mix
from gruppo.objective.credit import DrGrpo, Grpo, Rloo, outcome
from gruppo.objective.estimate import majority, pass_at_k, pass_hat_k, standard_error
from gruppo.objective.filters import (
    mean_inside,
    offline_pass_rate,
    refill,
    solved_prompts,
)
from gruppo.objective.masks import (
    ExcludeBefore,
    MaskAfter,
    loss_mask,
    mask_from_stop,
)
from gruppo.objective.pairs import dpo_loss, implicit_reward, ipo_loss
from gruppo.objective.staleness import is_fresh, may_start, staleness
from gruppo.objective.surrogate import PpoClip
from gruppo.objective.theory import (
    entropy_reward_law,
    expected_group_gradient,
    gradient_scale,
    inverse_std,
    policy_gradient,
    scaling_sigmoid,
)
from gruppo.objective.value import value_loss
from gruppo.objective.weights import TokenMean, Totals, aggregate
from gruppo.types import Evidence, is_live
from support.loss_steps import rows_for_rollout

TOKEN_MEAN = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())

Golden = Callable[[str], dict]


def f64(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(expected: object, case: dict) -> object:
    return pytest.approx(expected, abs=case["tol"], rel=0.0)


def test_adaptive_kl(golden: Golden) -> None:
    case = golden("ctl/adaptive_kl")
    inputs = case["inputs"]
    control = AdaptiveKL(target=inputs["target"], horizon=inputs["horizon"])
    state, coefficient = control.start(inputs["coef"])
    assert coefficient == inputs["coef"]
    after = []
    for observed in inputs["observed"]:
        state, coefficient = control(state, observed, inputs["n_steps"])
        after.append(coefficient)
    assert after == near(case["expected"]["coef_after"], case)


def test_adaptive_entropy(golden: Golden) -> None:
    case = golden("ctl/adaptive_entropy")
    inputs = case["inputs"]
    control = AdaptiveEntropy(
        target=inputs["target"], delta=inputs["delta"], min=inputs["min"], max=inputs["max"]
    )
    state, coefficient = control.start(inputs["initial"])
    applied, after = [], []
    for entropy in inputs["entropy_per_step"]:
        applied.append(coefficient)
        state, coefficient = control(state, entropy, 8)
        after.append(state)
    assert applied == near(case["expected"]["coef_applied_at_step"], case)
    assert after == near(case["expected"]["coef_after_step"], case)


def test_reference_mix(golden: Golden) -> None:
    case = golden("ctl/ref_ema")
    inputs = case["inputs"]
    mixed = mix(f64(inputs["ref"]), f64(inputs["policy"]), alpha=inputs["alpha"])
    assert mixed.tolist() == near(case["expected"]["ref_after"], case)


def test_entropy_reward_law(golden: Golden) -> None:
    case = golden("entropy/reward_law")
    inputs = case["inputs"]
    rewards = [entropy_reward_law(h, a=inputs["a"], b=inputs["b"]) for h in inputs["H"]]
    assert rewards == near(case["expected"]["R"], case)


def test_staleness(golden: Golden) -> None:
    case = golden("async/staleness_filter")
    inputs = case["inputs"]
    rows, now = inputs["token_versions"], inputs["current_version"]
    age = [staleness(row, now) for row in rows]
    assert age == case["expected"]["staleness_first_token"]
    fresh = [is_fresh(row, now, max_staleness=inputs["max_staleness"]) for row in rows]
    assert fresh == case["expected"]["keep"]


def test_admission(golden: Golden) -> None:
    case = golden("async/admission_rule")
    inputs = case["inputs"]
    admitted = [
        may_start(
            number, batch=inputs["batch"], version=inputs["version"], max_staleness=inputs["eta"]
        )
        for number in inputs["submitted"]
    ]
    assert admitted == case["expected"]["admit"]


def test_dynamic_sampling(golden: Golden) -> None:
    case = golden("filter/dynamic_sampling")
    groups, expected = case["inputs"]["groups"], case["expected"]
    assert {name: is_live(group) for name, group in groups.items()} == expected["keep_std_positive"]
    inside = {name: mean_inside(group) for name, group in groups.items()}
    assert inside == expected["keep_accuracy_open_interval"]


def test_refill(golden: Golden) -> None:
    case = golden("filter/refill_loop")
    inputs, expected = case["inputs"], case["expected"]
    batches = iter(inputs["batches"])
    missing: list[int] = []

    def draw(number: int) -> list[list]:
        missing.append(number)
        return next(batches)

    result = refill(
        draw,
        lambda group: group[1],
        target=inputs["target_groups"],
        max_batches=inputs["max_batches"],
    )
    assert [name for name, _ in result.used] == expected["used"]
    assert [name for name, _ in result.surplus] == ["f"]
    assert [name for name, _ in result.rejected] == ["a", "c"]
    assert result.generated == expected["generated_groups"]
    assert result.batches == expected["batches_used"]
    assert missing == [3, 2]


def test_refill_uses_what_was_carried_and_stops_at_the_limit() -> None:
    result = refill(lambda missing: [1, 2], lambda n: n > 1, target=5, max_batches=3, carry=[9])
    assert result.used == (9, 2, 2, 2)
    assert (result.batches, result.generated, result.surplus) == (3, 6, ())
    full = refill(lambda missing: [0], lambda n: True, target=1, carry=[7, 8])
    assert (full.used, full.surplus, full.batches) == ((7,), (8,), 0)


def test_no_positive_resampling(golden: Golden) -> None:
    case = golden("filter/no_positive_resampling")
    history = {name: (h["n"], h["c"]) for name, h in case["inputs"]["history"].items()}
    dropped = solved_prompts(history, threshold=case["inputs"]["threshold"])
    assert list(dropped) == case["expected"]["drop"]
    assert solved_prompts({"new": (0, 0)}) == ()


def test_offline_pass_rate(golden: Golden) -> None:
    case = golden("filter/offline_pass_rate")
    inputs = case["inputs"]
    kept = offline_pass_rate(inputs["pass_at_8"], low=inputs["low"], high=inputs["high"])
    assert list(kept) == case["expected"]["keep"]


def test_pass_at_k(golden: Golden) -> None:
    case = golden("eval/pass_at_k")
    n, c = case["inputs"]["n"], case["inputs"]["c"]
    assert [pass_at_k(n, c, k) for k in case["inputs"]["k"]] == near(case["expected"]["p"], case)
    edges = golden("eval/pass_at_k_edges")
    values = [pass_at_k(*numbers) for numbers in edges["inputs"]["cases"]]
    assert values == near(edges["expected"]["p"], edges)


def test_pass_hat_k(golden: Golden) -> None:
    case = golden("eval/pass_hat_k")
    n, c = case["inputs"]["n"], case["inputs"]["c"]
    assert [pass_hat_k(n, c, k) for k in case["inputs"]["k"]] == near(case["expected"]["p"], case)
    assert pass_hat_k(10, 3, 4) == 0.0


def test_majority(golden: Golden) -> None:
    case = golden("eval/majority")
    voted = majority(case["inputs"]["answers"])
    assert voted == case["expected"]["voted"]
    assert float(voted == case["inputs"]["gold"]) == case["expected"]["correct"]
    assert majority(["5", "4", "4", "5"]) == "5"
    assert majority([None, None]) is None


def test_standard_error(golden: Golden) -> None:
    case = golden("eval/stderr")
    error = standard_error(case["inputs"]["p"], case["inputs"]["n"])
    assert error == near(case["expected"]["se"], case)


def test_dpo(golden: Golden) -> None:
    case = golden("cmp/dpo")
    inputs, expected = case["inputs"], case["expected"]
    chosen_logp = f64([inputs["policy_chosen"]]).requires_grad_()
    rejected_logp = f64([inputs["policy_rejected"]]).requires_grad_()
    beta = inputs["beta"]
    chosen = implicit_reward(chosen_logp, f64([inputs["ref_chosen"]]), beta=beta)
    rejected = implicit_reward(rejected_logp, f64([inputs["ref_rejected"]]), beta=beta)
    assert chosen.item() == near(expected["reward_chosen"], case)
    assert rejected.item() == near(expected["reward_rejected"], case)
    assert (chosen - rejected).item() == near(expected["margin"], case)
    loss = dpo_loss(chosen, rejected)
    assert loss.item() == near(expected["loss"], case)
    assert ipo_loss(chosen, rejected, beta=beta).item() == near(expected["ipo_loss"], case)
    up, down = torch.autograd.grad(loss.sum(), (chosen_logp, rejected_logp))
    assert up.item() == near(expected["grad_policy_chosen"], case)
    assert down.item() == near(expected["grad_policy_rejected"], case)


def test_value_loss(golden: Golden) -> None:
    case = golden("cmp/ppo_value_loss")
    inputs = case["inputs"]
    values = f64(inputs["values"]).requires_grad_()
    mask, group = torch.tensor(inputs["mask"]).bool(), torch.zeros(1, dtype=torch.int64)
    per_token = value_loss(
        values, f64(inputs["old_values"]), returns=f64(inputs["returns"]), clip=inputs["clip"]
    )
    loss = aggregate(per_token, TokenMean()(mask, group, Totals.of(mask, group)))
    assert loss.item() == near(case["expected"]["loss"], case)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[0].tolist() == near(case["expected"]["grad_values"][0], case)


@pytest.mark.parametrize(
    ("credit", "key"),
    [(DrGrpo(), "expected_group_mean"), (Rloo(), "expected_leave_one_out")],
)
def test_bias_of_the_group_mean(golden: Golden, credit: DrGrpo | Rloo, key: str) -> None:
    case = golden("theory/group_mean_baseline_bias")
    pi, reward = f64(case["inputs"]["pi"]), f64(case["inputs"]["reward"])

    def advantage(rewards: torch.Tensor) -> torch.Tensor:
        groups = torch.arange(rewards.shape[0]).repeat_interleave(rewards.shape[1])
        rollout = outcome(rewards.flatten().tolist(), groups.tolist())
        return credit(rollout, Evidence()).reshape(rewards.shape)

    size = case["inputs"]["G"]
    expected = expected_group_gradient(pi, reward, group_size=size, advantage=advantage)
    assert expected.tolist() == near(case["expected"][key], case)
    exact = policy_gradient(pi, reward).tolist()
    assert exact == near(case["expected"]["true_policy_gradient"], case)


def test_difficulty_weight(golden: Golden) -> None:
    case = golden("theory/grpo_difficulty_weight")
    rates, expected = case["inputs"]["p"], case["expected"]
    assert [inverse_std(p) for p in rates] == near(expected["inverse_std"], case)
    flat = [gradient_scale(p, std_power=0) for p in rates]
    assert flat == near(expected["dr_grpo_grad_scale"], case)
    scaled = [gradient_scale(p, std_power=1) for p in rates]
    assert scaled == near(expected["grpo_grad_scale"], case)


def test_scaling_sigmoid(golden: Golden) -> None:
    case = golden("theory/scalerl_sigmoid")
    inputs = case["inputs"]
    rates = [
        scaling_sigmoid(
            compute,
            start=inputs["R0"],
            ceiling=inputs["A"],
            midpoint=inputs["C_mid"],
            exponent=inputs["B"],
        )
        for compute in inputs["C"]
    ]
    assert rates == near(case["expected"]["R"], case)


def test_batch_arithmetic(golden: Golden) -> None:
    case = golden("cfg/batch_math")
    recipes = case["inputs"]["recipes"]
    rows = [rows_per_rollout(r["prompts"], r["G"]) for r in recipes]
    assert rows == case["expected"]["responses"]
    steps = [
        optimizer_steps(r["prompts"], r["G"], minibatch_rows=r["minibatch_responses"])
        for r in recipes
    ]
    assert steps == case["expected"]["optimizer_steps_per_rollout"]
    with pytest.raises(ValueError, match="not divisible by 24; use 16 or 32"):
        optimizer_steps(4, 8, minibatch_rows=24)
    with pytest.raises(ValueError, match="whole groups"):
        optimizer_steps(4, 8, minibatch_rows=4)


def test_micro_split(golden: Golden) -> None:
    case = golden("cfg/micro_split")
    inputs = case["inputs"]
    steps = accumulation_steps(
        inputs["minibatch_responses"],
        ranks=inputs["dp_size"],
        micro_rows=inputs["micro_batch_per_rank"],
    )
    assert steps == case["expected"]["grad_accumulation"]


def test_mask_from_stop(golden: Golden) -> None:
    case = golden("mask/from_eos")
    inputs, expected = case["inputs"], case["expected"]
    mask, length, truncated = mask_from_stop(torch.tensor(inputs["token_ids"]), [inputs["eos"]])
    assert mask.long().tolist() == expected["mask"]
    assert length.tolist() == expected["lengths"]
    assert truncated.tolist() == expected["truncated"]


def test_tool_tokens(golden: Golden) -> None:
    case = golden("mask/tool_tokens")
    generated = torch.tensor(case["inputs"]["completion_mask"]).bool()
    own = torch.tensor(case["inputs"]["tool_mask"]).bool()
    assert loss_mask(generated, own).long().tolist() == case["expected"]["loss_mask"]


@pytest.mark.parametrize(
    ("policy", "key"), [(MaskAfter(), "mask_after"), (ExcludeBefore(), "exclude_before")]
)
def test_truncated_rows(golden: Golden, policy: MaskAfter | ExcludeBefore, key: str) -> None:
    case = golden("mask/truncated_rows")
    assert policy.kind == key
    expected = case["expected"][key]
    rollout = outcome(case["inputs"]["rewards"][0], [0] * 4)
    truncated = torch.tensor(case["inputs"]["truncated"][0])
    changed = policy(replace(rollout, truncated=truncated))
    advantage = Grpo()(changed, Evidence())
    assert advantage.tolist() == near(expected["advantages"][0], case)
    trains = (rows_for_rollout(TOKEN_MEAN, changed, advantage).weight > 0).any(dim=1)
    assert trains.long().tolist() == expected["row_trains"]
