"""The algorithm, top to bottom: prompt → rollout → reward → advantage → loss → update.

One loop. Modes differ in what is passed in (the engine, the objective, the rollouts), never in a
second loop. What a step *is* stands in ``iterate``; how each part works stands in the module
it names. This module reads no files and parses no settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.diagnose import step_metrics
from gruppo.errors import NumericError, ServiceError
from gruppo.evaluate import Evaluation, Evaluator
from gruppo.interrupt import Interrupted, Interrupts
from gruppo.objective import Coefficients, Objective
from gruppo.policy import Policy
from gruppo.rollout import Collected, Rollouts, tensorise
from gruppo.selftest import self_test
from gruppo.settings import TrainSettings
from gruppo.types import Callback, Engine, Group
from gruppo.update import Targets, UpdateResult, gather_evidence, update

MAX_SKIPPED = 3
"""Non-finite steps in a row that stop the run: one is bad luck, three are a broken run."""

MAX_UNSCORED = 0.2
"""Share of unscored completions above which, MAX_SKIPPED steps running, the reward is broken."""

End = Literal["steps", "time", "patience"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """What the loop must remember from one finished step to the next, also through a restart.

    ``rollouts`` is the problem stream's position and buffered groups; ``rng`` torch's generator
    (dropout draws from it, nothing else does).
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
    evals_without_gain: int = 0
    completion_tokens: int = 0


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
    """The parts of a training run."""

    policy: Policy
    engine: Engine
    rollouts: Rollouts
    objective: Objective
    settings: TrainSettings
    keeper: Keeper
    evaluator: Evaluator | None = None
    callbacks: tuple[Callback, ...] = ()
    interrupts: Interrupts = field(default_factory=Interrupts)


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
        NumericError: three steps in a row had a non-finite gradient; the weights are untouched.
        ServiceError: the reward or the engine failed for good.
        Interrupted: a signal came; the last finished step has been saved.
    """
    state = state or first_state(run)
    before = None
    self_test(run.policy, run.rollouts)
    if state.step == 0:
        state, before = evaluate_now(run, state)
    budget = _Budget(run.settings.time_limit_s)
    ended_by: End = "steps"
    with run.interrupts.installed():
        try:
            while state.step < run.settings.steps and ended_by == "steps":
                iteration = iterate(run, state)
                state = finish(run, state, iteration, seconds=budget.lap())
                run.interrupts.release()
                ended_by = _reason_to_stop(run, state, budget)
        except Interrupted:
            run.keeper.save(state)
            raise
    run.keeper.save(state)
    after = before if state.step == 0 else evaluate_now(run, state)[1]
    return Outcome(state=state, ended_by=ended_by, before=before, after=after)


def iterate(run: Run, state: TrainState) -> Iteration:
    """One iteration of GRPO (arXiv:2402.03300, algorithm 1, lines 5 to 11)."""
    policy, objective, version = run.policy, run.objective, run.policy.version
    skip_dead = run.rollouts.settings.filter != "keep"
    how = run.settings.update(skip_dead=skip_dead)

    collected = run.rollouts.collect()
    rollout = tensorise(collected.groups, run.rollouts.reward, run.rollouts.settings)
    stale = [
        min(c.version, default=version) < version for g in collected.groups for c in g.completions
    ]
    evidence = gather_evidence(policy, objective, rollout, how, stale=stale)
    advantage = objective.credit(rollout, evidence)
    targets = Targets(rollout=rollout, evidence=evidence, advantage=advantage)
    result = update(
        policy,
        objective,
        targets,
        coefficients=state.coefficients,
        settings=how,
        before_step=run.interrupts.hold,
    )
    run.engine.load(None, policy.version)
    return Iteration(collected=collected, targets=targets, result=result, version=version)


def finish(run: Run, state: TrainState, iteration: Iteration, *, seconds: float) -> TrainState:
    """Close a step: reference, controllers, health, metrics, evaluation, checkpoint."""
    step = state.step + 1
    metrics = _metrics(state, iteration, seconds)
    previous, state = state, _advance(run, state, iteration, metrics)
    sync = run.settings.reference_sync_steps
    if sync and step % sync == 0:
        run.policy.sync_reference(run.settings.reference_mixup)
        metrics["ref/updates"] = float(step // sync)
    run.keeper.step(step, iteration.collected.groups, iteration.targets.advantage, metrics)
    for callback in run.callbacks:
        callback(step, iteration.collected.groups, metrics)
    _stop_if_broken(run, previous, state, iteration)
    every = run.evaluator.settings.every if run.evaluator else 0
    if every and step % every == 0 and step < run.settings.steps:
        state, _ = evaluate_now(run, state)
    if run.keeper.due(step) or (state.best_step == step > 0):
        run.keeper.save(state)
    return state


def first_state(run: Run) -> TrainState:
    """State before the first step."""
    kl, entropy = run.objective.kl, run.objective.entropy
    beta, alpha = kl.beta if kl else 0.0, entropy.coef if entropy else 0.0
    kl_state, kl_coef = kl.adaptive.start(beta) if kl and kl.adaptive else (beta, beta)
    entropy_state, entropy_coef = (
        entropy.adaptive.start(alpha) if entropy and entropy.adaptive else (alpha, alpha)
    )
    return TrainState(
        kl_state=kl_state,
        entropy_state=entropy_state,
        coefficients=Coefficients(kl=kl_coef, entropy=entropy_coef),
        rollouts=run.rollouts.state(),
        rng=torch.get_rng_state(),
    )


def evaluate_now(run: Run, state: TrainState) -> tuple[TrainState, Evaluation | None]:
    """Evaluate the present weights, keep the result, and remember the best step."""
    if run.evaluator is None:
        return state, None
    evaluation = run.evaluator()
    run.keeper.evaluation(state.step, evaluation)
    score = evaluation.metrics.get("pass@1", next(iter(evaluation.metrics.values())))
    if state.best is None or score > state.best:
        return replace(state, best=score, best_step=state.step, evals_without_gain=0), evaluation
    return replace(state, evals_without_gain=state.evals_without_gain + 1), evaluation


def _metrics(state: TrainState, iteration: Iteration, seconds: float) -> dict[str, float]:
    collected, result = iteration.collected, iteration.result
    drawn = sum(len(c.tokens) for g in collected.generated for c in g.completions)
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
        "kl/beta": state.coefficients.kl,
        "entropy/coef": state.coefficients.entropy,
        "group/gen_batches": float(collected.gen_batches),
        "tokens/sampled": float(drawn),
        "time/sampling": collected.seconds_sampling,
        "time/scoring": collected.seconds_scoring,
        "time/step": seconds,
        "time/tokens_per_s": drawn / seconds if seconds else 0.0,
    }


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
    unscored = metrics["reward/unscored_frac"] > MAX_UNSCORED
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
        completion_tokens=state.completion_tokens + int(metrics["tokens/sampled"]),
    )


def _stop_if_broken(run: Run, before: TrainState, state: TrainState, iteration: Iteration) -> None:
    if state.skipped_in_row:
        command = run.keeper.dump(before, iteration.targets)
        if state.skipped_in_row >= MAX_SKIPPED:
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


def _reason_to_stop(run: Run, state: TrainState, budget: _Budget) -> End:
    patience = run.evaluator.settings.patience if run.evaluator else 0
    if patience and state.evals_without_gain >= patience:
        return "patience"
    return "time" if budget.is_short() else "steps"


@dataclass(slots=True)
class _Budget:
    """Wall-clock time: laps for the metrics, and whether another step fits the limit."""

    limit: float
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.longest = max(self.longest, seconds)
        return seconds

    def is_short(self) -> bool:
        """Whether a step as long as the longest so far would overrun the limit."""
        return self.limit > 0 and self.last - self.started + self.longest > self.limit
