"""The algorithm, top to bottom: prompt → rollout → reward → advantage → loss → update.

One loop. Modes differ in what is passed in (the engine, the objective, the rollouts), never in a
second loop. What a step *is* stands in ``iterate``; how each part works stands in the module
it names. This module reads no files and parses no settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.budget import Budget
from gruppo.diagnose import (
    answer_metrics,
    composition_metrics,
    data_metrics,
    language_metrics,
    step_metrics,
)
from gruppo.errors import NumericError, OutOfMemory, ServiceError
from gruppo.evaluate import Evaluation, Evaluator
from gruppo.interrupt import Interrupted, Interrupts, unwrapped
from gruppo.memory import Fitting, keep_heap, release_heap
from gruppo.objective import Coefficients, Objective
from gruppo.policy import Policy
from gruppo.rollout import Collected, Rollouts, tensorise
from gruppo.selftest import self_test
from gruppo.settings import TrainSettings
from gruppo.types import Callback, Engine, Group, Listener
from gruppo.update import SETTING, Targets, UpdateResult, gather_evidence, update

MAX_SKIPPED = 3
"""Non-finite steps in a row that stop the run: one is bad luck, three are a broken run."""

MAX_UNSCORED = 0.2
"""Share of unscored completions above which, MAX_SKIPPED steps running, the reward is broken."""

End = Literal["steps", "time", "patience"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """What the loop must remember from one finished step to the next, also through a restart.

    ``rollouts`` is the problem stream's position and buffered groups; ``rng`` torch's generator
    (dropout draws from it, nothing else does); ``evaluated`` the step of the newest evaluation.
    """

    step: int = 0
    kl_state: float
    entropy_state: float
    coefficients: Coefficients
    rollouts: Mapping[str, object]
    rng: Tensor
    skipped_in_row: int = 0
    unscored_in_row: int = 0
    best: float | None = None
    best_step: int = 0
    evaluated: int = -1
    evals_without_gain: int = 0


@runtime_checkable
class Keeper(Protocol):
    """Keeps what happens: metrics, samples, checkpoints. The loop says when, it knows how."""

    def step(
        self, step: int, groups: Sequence[Group], advantage: Tensor, metrics: Mapping[str, float]
    ) -> None:
        """Keep a finished step."""
        ...

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Keep an evaluation."""
        ...

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        ...

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of the policy's tensors and ``state`` (once, if asked twice)."""
        ...

    def dump(self, state: TrainState, targets: Targets) -> str:
        """Keep a step whose gradient was not finite; return the command that replays it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a training run.

    ``callbacks`` are called with ``(step, groups, metrics)`` after every step, ``listeners`` with
    ``(step, metrics)`` after every evaluation (0: before training): plain functions, or whatever
    can be called so.
    """

    policy: Policy
    engine: Engine
    rollouts: Rollouts
    objective: Objective
    settings: TrainSettings
    keeper: Keeper
    evaluator: Evaluator | None = None
    callbacks: tuple[Callback, ...] = ()
    listeners: tuple[Listener, ...] = ()
    interrupts: Interrupts = field(default_factory=Interrupts)
    budget: Budget = field(default_factory=Budget)
    fitting: Fitting = field(default_factory=lambda: Fitting(SETTING))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    ended_by: End
    before: Evaluation | None
    after: Evaluation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """Everything one step made, for the bookkeeping after it."""

    collected: Collected
    targets: Targets
    result: UpdateResult
    version: int


def train(run: Run, state: TrainState | None = None) -> Outcome:
    """Train from ``state`` (None: from the start) to the last step, and evaluate around it.

    Raises:
        OutOfMemory: a step does not fit, however it is cut; the last finished one has been saved
            (unless an update of this step was made already).
        NumericError: three steps in a row had a non-finite gradient (the weights are untouched),
            or the model's logits are not finite.
        ServiceError: the reward or the engine failed for good.
        Interrupted: a signal came; the last finished step has been saved.
    """
    keep_heap()
    state = state or first_state(run)
    started, ended_by, version = state.step, None, run.policy.version
    with run.interrupts.installed():
        try:
            with unwrapped():
                self_test(run.policy, run.rollouts)
                state, newest = evaluate_if_due(run, state)
                before = newest if started == 0 else None
                while (ended_by := _reason_to_stop(run, state)) is None:
                    with run.budget.timing("step"):
                        step_began = run.budget.clock()
                        iteration = iterate(run, state)
                        seconds = run.budget.clock() - step_began
                        state = finish(run, state, iteration, seconds=seconds)
                        version = run.policy.version
                    run.interrupts.release()
                    state, newest = evaluate_if_due(run, state)
                    save_if_due(run, state)
                save_whole(run, state)
                if state.evaluated != state.step:
                    state, newest = evaluate_now(run, state)
        except Interrupted:
            run.keeper.save(state)
            raise
        except FloatingPointError as error:
            raise NumericError(f"after step {state.step}: {error}") from error
        except OutOfMemory:
            if run.policy.version == version:  # else a part of the step has been taken
                run.keeper.save(state)
            raise
    return Outcome(state=state, ended_by=ended_by, before=before, after=newest)


def iterate(run: Run, state: TrainState) -> Iteration:
    """One iteration of GRPO (arXiv:2402.03300, algorithm 1, lines 5 to 11)."""
    policy, objective, version = run.policy, run.objective, run.policy.version
    skip_dead = run.rollouts.settings.filter != "keep"
    how = run.settings.update(skip_dead=skip_dead)

    policy.activations.open()
    collected = run.rollouts.collect(state.step + 1)
    release_heap()
    rollout = tensorise(
        collected.groups,
        collected.reward,
        run.rollouts.settings,
        greedy_baseline=run.rollouts.greedy_baseline,
    )
    stale = collected.stale(version)
    evidence = gather_evidence(policy, objective, rollout, how, stale=stale, fitting=run.fitting)
    advantage = objective.credit(rollout, evidence)
    targets = Targets(rollout=rollout, evidence=evidence, advantage=advantage)
    result = update(
        policy,
        objective,
        targets,
        coefficients=state.coefficients,
        settings=how,
        before_step=run.interrupts.hold,
        fitting=run.fitting,
    )
    policy.activations.clear()
    run.engine.load(None, policy.version)
    return Iteration(collected=collected, targets=targets, result=result, version=version)


def finish(run: Run, state: TrainState, iteration: Iteration, *, seconds: float) -> TrainState:
    """Close a step: reference, controllers, health, metrics."""
    step = state.step + 1
    metrics = _metrics(run, state, iteration, seconds)
    previous, state = state, _advance(run, state, iteration, metrics)
    sync = run.settings.reference_sync_steps
    if sync and step % sync == 0:
        run.policy.sync_reference(run.settings.reference_mixup)
        metrics["ref/updates"] = float(step // sync)
    run.keeper.step(step, iteration.collected.groups, iteration.targets.advantage, metrics)
    for callback in run.callbacks:
        callback(step, iteration.collected.groups, metrics)
    _stop_if_broken(run, previous, state, iteration)
    return state


def evaluate_if_due(run: Run, state: TrainState) -> tuple[TrainState, Evaluation | None]:
    """Evaluate before the first step and every so many steps (the last one comes at the end).

    A restart may find the evaluation of its step not made yet; one is never made twice.
    """
    every = run.evaluator.settings.every if run.evaluator else 0
    due = state.step == 0 or (every > 0 and state.step % every == 0)
    if not due or state.evaluated == state.step or state.step >= run.settings.steps:
        return state, None
    return evaluate_now(run, state)


def save_if_due(run: Run, state: TrainState) -> None:
    """Save by the calendar, and after the best evaluation."""
    if run.keeper.due(state.step) or state.best_step == state.step:
        save_whole(run, state)


def save_whole(run: Run, state: TrainState) -> None:
    """Save without being interrupted."""
    run.interrupts.hold()
    with run.budget.timing("save"):
        run.keeper.save(state)
    run.interrupts.release()


def first_state(run: Run) -> TrainState:
    """State before the first step."""
    kl, entropy = run.objective.kl, run.objective.entropy
    beta, alpha = kl.beta if kl else 0.0, entropy.coef if entropy else 0.0
    return TrainState(
        kl_state=kl.adaptive.start(beta)[0] if kl and kl.adaptive else beta,
        entropy_state=entropy.adaptive.start(alpha)[0] if entropy and entropy.adaptive else alpha,
        coefficients=run.objective.coefficients,
        rollouts=run.rollouts.state(),
        rng=torch.get_rng_state(),
    )


def evaluate_now(run: Run, state: TrainState) -> tuple[TrainState, Evaluation | None]:
    """Evaluate the present weights, keep the result, and remember the best step."""
    if run.evaluator is None:
        return state, None
    with run.budget.timing("evaluation"):
        evaluation = run.evaluator()
        run.keeper.evaluation(state.step, evaluation)
    for listener in run.listeners:
        listener(state.step, evaluation.metrics)
    state = replace(state, evaluated=state.step)
    score = evaluation.metrics.get("pass@1", next(iter(evaluation.metrics.values())))
    if state.best is None or score > state.best:
        return replace(state, best=score, best_step=state.step, evals_without_gain=0), evaluation
    return replace(state, evals_without_gain=state.evals_without_gain + 1), evaluation


def _metrics(run: Run, state: TrainState, iteration: Iteration, seconds: float) -> dict[str, float]:
    collected, result = iteration.collected, iteration.result
    drawn = sum(len(c.own_tokens) for g in collected.generated for c in g.completions)
    return {
        **step_metrics(
            collected.groups,
            collected.generated,
            iteration.targets.rollout,
            iteration.targets.advantage,
            update=result.metrics,
            reports=result.reports,
            version=iteration.version,
        ),
        **language_metrics(collected.groups, run.rollouts.reward.parts),
        **composition_metrics(collected.groups, run.rollouts.reward.parts, step=state.step + 1),
        **answer_metrics(collected.generated or collected.groups, run.rollouts.reward),
        **data_metrics(run.rollouts.stream),
        "kl/beta": state.coefficients.kl,
        "entropy/coef": state.coefficients.entropy,
        "group/gen_batches": float(collected.gen_batches),
        "group/partial": float(_is_partial(run, collected)),
        "tokens/sampled": float(drawn),
        "time/sampling": collected.seconds_sampling,
        "time/scoring": collected.seconds_scoring,
        "time/step": seconds,
        "time/tokens_per_s": drawn / seconds if seconds else 0.0,
    }


def _is_partial(run: Run, collected: Collected) -> bool:
    """Whether ``rollout.on_limit`` let the step go on with fewer groups than asked for."""
    settings = run.rollouts.settings
    return settings.filter == "resample" and len(collected.groups) < settings.prompts_per_step


def _advance(
    run: Run, state: TrainState, iteration: Iteration, metrics: Mapping[str, float]
) -> TrainState:
    """The state after this step: counters, and controllers fed with what the step showed."""
    objective, rows = run.objective, len(iteration.targets.rollout.group)
    kl_state, kl = state.kl_state, state.coefficients.kl
    entropy_state, entropy = state.entropy_state, state.coefficients.entropy
    if objective.kl and objective.kl.adaptive and "kl/ref_k3" in metrics:
        kl_state, kl = objective.kl.adaptive(kl_state, metrics["kl/ref_k3"], rows)
    if objective.entropy and objective.entropy.adaptive and "entropy/mean" in metrics:
        entropy_state, entropy = objective.entropy.adaptive(
            entropy_state, metrics["entropy/mean"], rows
        )
    skipped = any(report.skipped for report in iteration.result.reports)
    # as graded: rows that only a truncation policy leaves out are no failure of the reward
    scores = [score for group in iteration.collected.groups for score in group.scores]
    unscored = sum(score.total is None for score in scores) > MAX_UNSCORED * len(scores)
    return replace(
        state,
        step=state.step + 1,
        kl_state=kl_state,
        entropy_state=entropy_state,
        coefficients=Coefficients(kl=kl, entropy=entropy),
        rollouts=run.rollouts.state(),
        rng=torch.get_rng_state(),
        skipped_in_row=state.skipped_in_row + 1 if skipped else 0,
        unscored_in_row=state.unscored_in_row + 1 if unscored else 0,
    )


def _stop_if_broken(run: Run, before: TrainState, state: TrainState, iteration: Iteration) -> None:
    if state.skipped_in_row:
        command = run.keeper.dump(before, iteration.targets)
        if state.skipped_in_row >= MAX_SKIPPED:
            run.keeper.save(before)  # the weights are sound: nothing of the good steps is lost
            raise NumericError(
                f"the gradient was not finite in {MAX_SKIPPED} steps in a row (last: step "
                f"{state.step}); the weights are those before them. Replay it with: {command}"
            )
    if state.unscored_in_row >= MAX_SKIPPED:
        run.keeper.save(state)
        raise ServiceError(
            f"more than {MAX_UNSCORED:.0%} of the completions could not be scored in "
            f"{MAX_SKIPPED} steps in a row; the last reasons are in the run's samples. The run "
            "is saved: mend the reward and resume"
        )


def _reason_to_stop(run: Run, state: TrainState) -> End | None:
    if state.step >= run.settings.steps:
        return "steps"
    patience = run.evaluator.settings.patience if run.evaluator else 0
    if patience and state.evals_without_gain >= patience:
        return "patience"
    evaluates = run.evaluator is not None
    return "time" if run.budget.is_short(run.settings.time_limit_s, evaluates=evaluates) else None
