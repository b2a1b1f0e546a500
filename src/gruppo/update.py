"""From a rollout batch to new weights: the no-grad evidence, and the optimizer steps.

Normalisers are counted over the whole optimizer step (and all ranks) before the first forward
pass, so how rows are split into micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import torch
from torch import Tensor

from gruppo import dist
from gruppo.memory import Fitting, micro_batches
from gruppo.metric import Max, Metric, Sum, correlation_over, extremes, mean_over, merge, reduce
from gruppo.objective import (
    Coefficients,
    Live,
    LocalTokenMean,
    Loss,
    Objective,
    Rows,
    Totals,
    compute_loss,
    make_rows,
)
from gruppo.policy import Policy, UpdateReport
from gruppo.settings import UpdateSettings
from gruppo.types import Evidence, Rollout

T = TypeVar("T")
SETTING: Final = "train.tokens_per_microbatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """A rollout batch with its evidence and its advantages: what the optimizer steps learn from."""

    rollout: Rollout
    evidence: Evidence
    advantage: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What the optimizer steps of one rollout batch did."""

    reports: tuple[UpdateReport, ...]
    metrics: Mapping[str, Metric] = field(default_factory=dict)


def gather_evidence(
    policy: Policy,
    objective: Objective,
    rollout: Rollout,
    settings: UpdateSettings,
    *,
    stale: Sequence[bool] = (),
    fitting: Fitting | None = None,
) -> Evidence:
    """Run the no-grad passes that the objective asks for, and no other.

    With one update per batch the old log-probabilities are those of the training forward itself,
    so there is no pass for them. ``stale[b]`` marks rows drawn by older weights: for these the
    engine's log-probabilities are the behaviour policy's (2110.00641), hence the "old" ones.
    """
    needs_old = objective.needs_old(settings.num_updates) or any(stale)
    old = None
    if needs_old:
        old = _score_all(policy, rollout, settings, fitting, reference=False)
        if any(stale):
            behaviour = torch.where(rollout.engine_logp.isnan(), old, rollout.engine_logp)
            old = torch.where(torch.tensor(stale)[:, None], behaviour, old)
    reference = None
    if objective.needs_reference:
        reference = _score_all(policy, rollout, settings, fitting, reference=True)
    return Evidence(old_logp=old, ref_logp=reference)


def _score_all(
    policy: Policy,
    rollout: Rollout,
    settings: UpdateSettings,
    fitting: Fitting | None,
    *,
    reference: bool,
) -> Tensor:
    score = policy.ref_logp if reference else policy.old_logp
    everything = range(len(rollout.group))

    def attempt(budget: int) -> Tensor:
        result: Tensor | None = None
        for index in micro_batches(rollout, everything, budget, packed=policy.packed):
            prompts, tokens, length = _slice(rollout, index)
            logp = score(prompts, tokens, length).logp.cpu()
            if result is None:
                result = torch.zeros(rollout.tokens.shape, dtype=logp.dtype)
            result[index, : tokens.shape[1]] = logp
        return torch.zeros(rollout.tokens.shape) if result is None else result

    return _fitted(attempt, rollout, settings, fitting)


def _fitted(
    attempt: Callable[[int], T],
    rollout: Rollout,
    settings: UpdateSettings,
    fitting: Fitting | None,
    undo: Callable[[], None] = lambda: None,
) -> T:
    """``attempt`` with micro-batches that fit into memory; one row is the least to try."""
    prompts = torch.tensor([len(prompt) for prompt in rollout.prompts])
    sizes = rollout.length + prompts[rollout.group]
    return (fitting or Fitting(SETTING)).do(
        attempt,
        settings.tokens_per_microbatch,
        total=int(sizes.sum()),
        least=int(rollout.length.min().clamp(min=1)) if len(sizes) else 1,
        undo=undo,
    )


def update(
    policy: Policy,
    objective: Objective,
    targets: Targets,
    *,
    coefficients: Coefficients,
    settings: UpdateSettings,
    before_step: Callable[[], None] = lambda: None,
    fitting: Fitting | None = None,
) -> UpdateResult:
    """Take the optimizer steps of one rollout batch.

    ``before_step`` is called each time just before weights change. A loss that is not finite
    changes none. When memory runs out, the step's gradient is made anew in smaller micro-batches;
    ``fitting`` remembers for the next call what fitted.
    """
    fitting = fitting or Fitting(SETTING)
    step = OptimizerStep(policy, objective, targets, coefficients, settings, fitting)
    reports: list[UpdateReport] = []
    metrics: Mapping[str, Metric] = {}
    for number, rows in enumerate(_minibatches(targets.rollout, settings, policy.version)):
        seen = step.accumulate(rows, first=number == 0)
        before_step()
        reports.append(policy.step() if _is_finite(seen) else _refuse(policy))
        metrics = merge(metrics, seen)
    return UpdateResult(reports=tuple(reports), metrics=metrics)


def _is_finite(seen: Mapping[str, Metric]) -> bool:
    """Whether the loss is a number on every rank (its gradient may be one although it is not)."""
    loss = reduce(seen).get("loss/total", 0.0)
    return dist.all_max(float(not math.isfinite(loss))) == 0


def _refuse(policy: Policy) -> UpdateReport:
    policy.discard_gradient()
    return UpdateReport(grad_norm=math.nan, lr=0.0, update_ratio=0.0, skipped=True)


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One optimizer step over some rows of a rollout batch, micro-batch by micro-batch."""

    policy: Policy
    objective: Objective
    targets: Targets
    coefficients: Coefficients
    settings: UpdateSettings
    fitting: Fitting = field(default_factory=lambda: Fitting(SETTING))

    def accumulate(self, index: Tensor, *, first: bool) -> dict[str, Metric]:
        """Accumulate the gradient of rows ``index`` in the policy."""
        rows = self._rows(index)
        chosen = index[self._contributing(rows)].tolist()
        scale = dist.world_size()  # gradients are averaged over ranks, our losses are sums

        def attempt(budget: int) -> dict[str, Metric]:
            metrics: dict[str, Metric] = {}
            for micro in self._micro_batches(chosen, budget):
                part = rows.take(_positions(index, micro))
                part = self._locally_weighted(part, micro, len(index))
                loss, seen = self._forward(micro, part, first=first)
                self.policy.backward(loss.value * scale)
                metrics = merge(metrics, seen)
            return metrics

        metrics = self._fitted(attempt)
        if not chosen:
            self._pass_nothing(index)
        return metrics

    def _micro_batches(self, rows: list[int], budget: int) -> Iterator[Tensor]:
        return micro_batches(self.targets.rollout, rows, budget, packed=self.policy.packed)

    def _fitted(self, attempt: Callable[[int], T]) -> T:
        """Micro-batches that fit; a failed attempt's gradient is dropped before the next."""
        undo = self.policy.discard_gradient
        return _fitted(attempt, self.targets.rollout, self.settings, self.fitting, undo)

    def _pass_nothing(self, index: Tensor) -> None:
        """Give a step whose rows are all left out the gradient that they would have had: zero.

        A zero is not the absence of a gradient. AdamW passes over weights without one, but a zero
        counts as a step: moments decay and move the weights, and weight decay shrinks them. So
        the shortest row goes forward for a loss of 0, and weights that it does not reach (a head
        or expert that nothing goes through) stay without a gradient, as in every other step.
        Without a single completion token there is no gradient at all.
        """
        length = self.targets.rollout.length[index]
        if not (length > 0).any():
            return
        shortest = int(torch.where(length > 0, length, length.max() + 1).argmin())
        prompts, tokens, size = _slice(self.targets.rollout, index[shortest : shortest + 1])
        self.policy.backward(self.policy.logp(prompts, tokens, size).logp.sum() * 0.0)

    def _rows(self, index: Tensor) -> Rows:
        rollout, evidence = self.targets.rollout, self.targets.evidence
        mask, group = rollout.mask[index], rollout.group[index]
        old = None if evidence.old_logp is None else evidence.old_logp[index]
        reference = None if evidence.ref_logp is None else evidence.ref_logp[index]
        advantage = self.targets.advantage[index].float()
        wide = advantage if advantage.dim() == 2 else advantage[:, None].expand(mask.shape)
        return make_rows(
            self.objective,
            advantage=wide.contiguous(),
            mask=mask,
            group=group,
            scored=~rollout.total[index].isnan(),
            old_logp=old,
            engine_logp=rollout.engine_logp[index],
            ref_logp=reference,
            totals=_over_ranks(Totals.of(mask, group)),
            selected=self._select(index, mask, wide, old),
        )

    def _locally_weighted(self, rows: Rows, micro: Tensor, num_rows: int) -> Rows:
        """The rows as they are, but for the one aggregation that is defined by the split."""
        if not isinstance(self.objective.weights, LocalTokenMean):
            return rows
        group = self.targets.rollout.group[micro]
        totals = replace(Totals.of(rows.mask, group), rows=num_rows)
        weight = self.objective.weights(rows.mask, group, totals)
        return replace(rows, weight=weight, kl_weight=weight)

    def _select(
        self, index: Tensor, mask: Tensor, advantage: Tensor, old: Tensor | None
    ) -> Tensor | None:
        """Statistics over the whole optimizer step need one no-grad pass of the live policy."""
        select = self.objective.select
        if select is None:
            return None
        logp = torch.zeros(mask.shape)
        entropy = torch.zeros(mask.shape) if select.needs_entropy else None

        @torch.no_grad()
        def attempt(budget: int) -> None:
            for micro in self._micro_batches(index.tolist(), budget):
                prompts, tokens, length = _slice(self.targets.rollout, micro)
                scored = self.policy.old_logp(prompts, tokens, length, entropy=select.needs_entropy)
                local = _positions(index, micro)
                logp[local, : tokens.shape[1]] = scored.logp.float().cpu()
                if entropy is not None and scored.entropy is not None:
                    entropy[local, : tokens.shape[1]] = scored.entropy.float().cpu()

        self._fitted(attempt)
        return select(
            logp,
            entropy,
            old_logp=logp if old is None else old,
            advantage=advantage,
            mask=mask & ~self.targets.rollout.total[index].isnan()[:, None],
            seed=hash((self.settings.seed, self.policy.version)),
        )

    def _contributing(self, rows: Rows) -> Tensor:
        """Positions of rows that can have a gradient: without KL or entropy, those with A ≠ 0."""
        trained = rows.mask.any(dim=1)
        idle = self.coefficients.kl == 0 and self.coefficients.entropy == 0
        idle &= self.objective.select is None and not self.objective.acts_without_advantage
        # a controller must see all rows, whatever it lets its term count for in this step
        for term in (self.objective.kl, self.objective.entropy):
            idle &= term is None or term.adaptive is None
        idle &= not isinstance(self.objective.weights, LocalTokenMean)  # they count its tokens
        if self.settings.skip_dead and idle:
            trained &= ((rows.advantage != 0) & rows.mask).any(dim=1)
        return trained.nonzero()[:, 0]

    def _forward(self, micro: Tensor, rows: Rows, *, first: bool) -> tuple[Loss, dict[str, Metric]]:
        prompts, tokens, length = _slice(self.targets.rollout, micro)
        scored = self.policy.logp(prompts, tokens, length, entropy=True)
        rows = rows.to(scored.logp.device, scored.logp.dtype)
        assert scored.entropy is not None, "asked for: at least it is logged"
        entropy, width = scored.entropy, rows.mask.shape[1]
        live = Live(logp=_widen(scored.logp, width), entropy=_widen(entropy, width), mask=rows.mask)
        loss = compute_loss(self.objective, live, rows, self.coefficients)
        seen = merge(token_metrics(loss, rows, first=first), live_metrics(live, rows))
        if loss.tokens.is_keep is not None:  # sequence ratios reject long rows first
            length = self.targets.rollout.length
            longest = (length >= length.double().quantile(0.9))[micro].to(rows.mask.device)
            rejected, where = ~loss.tokens.is_keep, rows.mask & longest[:, None]
            seen["is/rejected_frac_longest"] = mean_over(rejected.float(), where)
        clips_rows = self.objective.surrogate.uses_clip and self.objective.ratio_of_rows
        return loss, merge(seen, row_metrics(loss, rows) if clips_rows else {})


def token_metrics(loss: Loss, rows: Rows, *, first: bool) -> dict[str, Metric]:
    """Sums over this micro-batch's trained tokens of everything that is logged per token."""
    seen = loss.tokens
    mask = rows.mask
    low, high = extremes(seen.ratio, mask)
    metrics: dict[str, Metric] = {
        "loss/total": Sum(float(loss.value.detach())),
        "loss/policy": Sum(float(loss.policy)),
        "ratio/mean": mean_over(seen.ratio, mask),
        "ratio/min": low,
        "ratio/max": high,
        "clip/low": mean_over(seen.clipped_low.float(), mask),
        "clip/high": mean_over(seen.clipped_high.float(), mask),
        "policy/kl_old_k3": mean_over(seen.ratio - 1 - seen.ratio.log(), mask),
    }
    if first:
        metrics["ratio/first_minibatch_maxdev"] = Max(max(high.value - 1, 1 - low.value, 0.0))
    if seen.kl is not None:
        metrics["kl/ref_k3"] = mean_over(seen.kl, mask)
    if seen.is_weight is not None and seen.is_keep is not None:
        metrics["is/weight_mean"] = mean_over(seen.is_weight, mask)
        metrics["is/rejected_frac"] = mean_over((~seen.is_keep).float(), mask)
    return metrics


def row_metrics(loss: Loss, rows: Rows) -> dict[str, Metric]:
    """Share of the rows in which a bound took the gradient of some token away.

    For losses whose ratio belongs to the whole completion that is the share of clipped ratios,
    while ``clip/low`` and ``clip/high`` count their tokens.
    """
    clipped = (loss.tokens.clipped_low | loss.tokens.clipped_high).any(dim=1)
    return {"clip/rows": mean_over(clipped.float(), rows.mask.any(dim=1))}


def live_metrics(live: Live, rows: Rows) -> dict[str, Metric]:
    """Entropy, and how far the engine's log-probabilities are from the trainer's."""
    metrics: dict[str, Metric] = {}
    if live.entropy is not None:
        metrics["entropy/mean"] = mean_over(live.entropy, live.mask)
    if rows.engine_logp is None:
        return metrics
    trainer = live.logp.detach() if rows.old_logp is None else rows.old_logp
    known = live.mask & ~rows.engine_logp.isnan()
    gap = torch.where(known, trainer - rows.engine_logp, 0.0).clamp(-20, 20)
    ratio = gap.exp()
    ours, theirs = trainer.exp(), rows.engine_logp.exp()
    metrics["is/mismatch_k1"] = mean_over(-gap, known)
    metrics["is/mismatch_k3"] = mean_over(ratio - 1 - gap, known)
    metrics["is/max_prob_diff"] = extremes((ours - theirs).abs(), known)[1]
    metrics["is/prob_correlation"] = correlation_over(ours, theirs, known)
    metrics["is/_weight"] = mean_over(ratio, known)
    metrics["is/_weight_squared"] = mean_over(ratio.square(), known)
    return metrics


def _minibatches(rollout: Rollout, settings: UpdateSettings, version: int) -> Iterator[Tensor]:
    """Row indices of each optimizer step: every epoch cuts the shuffled groups anew."""
    groups = len(rollout.prompts)
    for epoch in range(settings.inner_epochs):
        order = torch.arange(groups)
        if settings.minibatches > 1:
            shuffle = torch.Generator().manual_seed(hash((settings.seed, version, epoch)) % 2**63)
            order = torch.randperm(groups, generator=shuffle)
        for part in torch.tensor_split(order, settings.minibatches):
            yield torch.isin(rollout.group, part).nonzero()[:, 0]


def _slice(rollout: Rollout, rows: Tensor) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """Prompts, completion tokens (cut to the longest) and lengths of some rows."""
    length = rollout.length[rows]
    tokens = rollout.tokens[rows, : int(length.max())]
    return [rollout.prompts[int(group)] for group in rollout.group[rows]], tokens, length


def _positions(rows: Tensor, some: Tensor) -> Tensor:
    """Where each of ``some`` stands in ``rows`` (which is sorted)."""
    return torch.searchsorted(rows, some)


def _widen(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _over_ranks(totals: Totals) -> Totals:
    """Sum the counts over ranks. Ranks hold whole groups, so a group's own count is local."""
    local = torch.tensor([totals.tokens, totals.rows, totals.prompts])
    tokens, rows, prompts = dist.all_sum(local).tolist()
    return replace(totals, tokens=tokens, rows=rows, prompts=prompts)
