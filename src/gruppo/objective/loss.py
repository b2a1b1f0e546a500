"""The loss of one micro-batch, from the parts that an ``Objective`` names.

Everything that needs more than one row (advantages, coefficients, selections, normalisers) is
computed beforehand for the whole optimizer step and travels with the rows; here a row never sees
another one. So the gradient with respect to log-probabilities is the same for every split into
micro-batches and ranks, and losses simply add. Deliberately absent: models, backward passes,
metrics (``TokenTerms`` holds what they are made of), division by accumulation steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.objective.composition import Coefficients, Objective
from gruppo.objective.kl import k3
from gruppo.objective.surrogate import Live, log_ratio
from gruppo.objective.weights import Totals


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What the loss needs of some rows besides the live forward; values under the mask are free.

    ``advantage``, ``weight`` (the coefficients c of the policy term, 0 on unscored rows) and
    ``kl_weight`` (those of the KL and entropy terms) are [B, T]. ``old_logp`` is None where the
    step is on-policy: the live values take its place. ``engine_logp`` may hold NaN where the
    engine gave nothing. ``selected`` is what the objective's selection chose. ``is_weight`` and
    ``is_keep`` hold the engine correction if ``old_logp`` was known beforehand; None means that
    it is computed in the forward.
    """

    mask: Bool[Tensor, "B T"]
    advantage: Float[Tensor, "B T"]
    scored: Bool[Tensor, "B"]
    old_logp: Float[Tensor, "B T"] | None
    engine_logp: Float[Tensor, "B T"] | None
    ref_logp: Float[Tensor, "B T"] | None
    weight: Float[Tensor, "B T"]
    kl_weight: Float[Tensor, "B T"]
    selected: Bool[Tensor, "B T"] | None
    is_weight: Float[Tensor, "B T"] | None = None
    is_keep: Bool[Tensor, "B T"] | None = None

    def take(self, index: Int[Tensor, "N"], *, width: int | None = None) -> Rows:
        """The rows ``index`` in that order; with ``width`` only the first positions."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)][:, :width]

        return Rows(
            mask=cut(self.mask),
            advantage=cut(self.advantage),
            scored=self.scored[index.to(self.scored.device)],
            old_logp=None if self.old_logp is None else cut(self.old_logp),
            engine_logp=None if self.engine_logp is None else cut(self.engine_logp),
            ref_logp=None if self.ref_logp is None else cut(self.ref_logp),
            weight=cut(self.weight),
            kl_weight=cut(self.kl_weight),
            selected=None if self.selected is None else cut(self.selected),
            is_weight=None if self.is_weight is None else cut(self.is_weight),
            is_keep=None if self.is_keep is None else cut(self.is_keep),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Rows:
        """The same rows on ``device``, floating-point tensors as ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            # Cast first: some devices have no float64.
            return (tensor.to(dtype) if tensor.is_floating_point() else tensor).to(device)

        return Rows(
            mask=move(self.mask),
            advantage=move(self.advantage),
            scored=move(self.scored),
            old_logp=None if self.old_logp is None else move(self.old_logp),
            engine_logp=None if self.engine_logp is None else move(self.engine_logp),
            ref_logp=None if self.ref_logp is None else move(self.ref_logp),
            weight=move(self.weight),
            kl_weight=move(self.kl_weight),
            selected=None if self.selected is None else move(self.selected),
            is_weight=None if self.is_weight is None else move(self.is_weight),
            is_keep=None if self.is_keep is None else move(self.is_keep),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTerms:
    """Detached tensors [B, T] of one micro-batch, for diagnostics; neutral under the mask.

    ``ratio`` is exp(clamp(logp - old_logp, ±20)) with the denominator in force; ``kept`` marks
    tokens whose policy term counts; ``kl`` is k3 against the reference, whatever the gradient
    estimator; ``is_weight`` and ``is_keep`` are the engine correction.
    """

    ratio: Float[Tensor, "B T"]
    clipped_low: Bool[Tensor, "B T"]
    clipped_high: Bool[Tensor, "B T"]
    kept: Bool[Tensor, "B T"]
    kl: Float[Tensor, "B T"] | None
    is_weight: Float[Tensor, "B T"] | None
    is_keep: Bool[Tensor, "B T"] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """One micro-batch's share of the step: value = policy + β·kl - α·entropy.

    ``value`` carries the gradient; ``policy``, ``kl`` and ``entropy`` are detached sums over the
    rows with their coefficients, and add up over micro-batches and ranks.

    Example:
        >>> from gruppo.objective import DrGrpo, PpoClip, TokenMean
        >>> objective = Objective(credit=DrGrpo(), surrogate=PpoClip(), weights=TokenMean())
        >>> mask, group = torch.tensor([[True], [True]]), torch.tensor([0, 0])
        >>> rows = make_rows(objective, advantage=torch.tensor([0.5, -0.5]), mask=mask,
        ...     group=group, scored=torch.tensor([True, True]), old_logp=None, engine_logp=None,
        ...     ref_logp=None, totals=Totals.of(mask, group), selected=None)
        >>> logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
        >>> live = Live(logp=logp, entropy=None, mask=mask)
        >>> compute_loss(objective, live, rows, Coefficients()).value.backward()
        >>> logp.grad
        tensor([[-0.2500],
                [ 0.2500]])
    """

    value: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    tokens: TokenTerms


def make_rows(  # noqa: PLR0913 - one argument for each tensor of a step
    objective: Objective,
    *,
    advantage: Float[Tensor, "B"] | Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, "B"],
    scored: Bool[Tensor, "B"],
    old_logp: Float[Tensor, "B T"] | None,
    engine_logp: Float[Tensor, "B T"] | None,
    ref_logp: Float[Tensor, "B T"] | None,
    totals: Totals,
    selected: Bool[Tensor, "B T"] | None,
) -> Rows:
    """The rows of one optimizer step on this rank, all at once.

    Coefficients come from ``totals``, so any part of the step may be taken from the result. A
    correction with ``batch_normalize`` is normalised over the rows given here; ``LocalTokenMean``
    is local to them (call this per micro-batch to have it depend on the split).

    Args:
        objective: What will be computed.
        advantage: Per row or per token; unscored rows hold 0.
        mask: Trained tokens.
        group: Group id of every row, 0 … P-1 as in ``totals``.
        scored: False on rows whose reward could not be computed: they leave the policy term but
            stay in the counts.
        old_logp: None when the step is on-policy.
        engine_logp: What the sampler recorded, NaN where it did not.
        ref_logp: Needed if ``objective.needs_reference``.
        totals: Counts of the whole step, over all ranks.
        selected: What ``objective.select`` chose, None without one.

    Raises:
        ValueError: something that the objective needs is missing.
    """
    _require_inputs(objective, old_logp=old_logp, ref_logp=ref_logp, selected=selected)
    per_token = advantage if advantage.ndim == 2 else advantage[:, None].expand(mask.shape)
    trained = mask & scored[:, None]
    coefficient = objective.weights(mask, group, totals)
    is_weight, is_keep = None, None
    if objective.correction is not None and old_logp is not None:
        engine = old_logp if engine_logp is None else engine_logp
        is_weight, is_keep = objective.correction(old_logp, engine, trained)
    return Rows(
        mask=mask,
        advantage=per_token.to(mask.device),
        scored=scored,
        old_logp=old_logp,
        engine_logp=engine_logp,
        ref_logp=ref_logp,
        weight=torch.where(trained, coefficient, 0),
        kl_weight=torch.where(mask, coefficient, 0),
        selected=selected,
        is_weight=is_weight,
        is_keep=is_keep,
    )


def _require_inputs(
    objective: Objective,
    *,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    selected: Tensor | None,
) -> None:
    if objective.kl is not None and objective.kl.active and ref_logp is None:
        raise ValueError(
            f"ref_logp = None, but the KL term (beta = {objective.kl.beta}) needs the reference's "
            "log-probabilities; run the reference pass, or set beta = 0"
        )
    if objective.select is not None and selected is None:
        raise ValueError(
            f"selected = None, but the objective selects tokens; call {objective.select!r} once "
            "for all rows of the step"
        )
    if objective.correction is not None and objective.correction.per_step and old_logp is None:
        raise ValueError(
            "old_logp = None, but batch_normalize needs the weights of all rows of the step at "
            "once; compute the old log-probabilities first, as objective.needs_old says"
        )


def compute_loss(objective: Objective, live: Live, rows: Rows, coefficients: Coefficients) -> Loss:
    """L = Σ c·w·keep·surrogate + β·Σ c·kl - α·Σ c·H over the rows given.

    Args:
        objective: The parts.
        live: The training forward of exactly these rows. Its ``entropy`` is differentiated only
            where α is not 0, else it is a number for the log. The rows' mask is the one in force.
        rows: From ``make_rows`` (and ``take``).
        coefficients: β and α of this step.

    Returns:
        The micro-batch's contribution; sum over micro-batches and ranks, divide by nothing.
    """
    live = _clean_live(live, rows)
    old, engine = _denominators(objective, live, rows)
    trained = rows.mask & rows.scored[:, None]
    advantage = torch.where(trained, rows.advantage.to(live.logp), 0)
    is_weight, is_keep = _correct(objective, rows, old=old, engine=engine)
    token = objective.surrogate(
        live,
        old_logp=old,
        engine_logp=engine,
        advantage=advantage,
        selected=rows.selected if _role(objective) == "penalise" else None,
    )
    kept = trained & _kept(objective, live, rows, old=old, engine=engine, advantage=advantage)
    scale = rows.weight.to(live.logp)
    if is_weight is not None and is_keep is not None:
        kept = kept & is_keep
        scale = scale * is_weight.to(live.logp)
    policy = torch.where(kept, scale * token.loss, 0).sum()
    kl, kl_value = _kl_sum(objective, live, rows, old)
    entropy = _entropy_sum(live, rows)
    # A term whose coefficient is 0 stays out of the graph: its backward pass would be for nothing.
    value = policy
    if coefficients.kl != 0:
        value = value + coefficients.kl * kl
    if coefficients.entropy != 0:
        value = value - coefficients.entropy * entropy
    return Loss(
        value=value,
        policy=policy.detach(),
        kl=kl.detach(),
        entropy=entropy.detach(),
        tokens=TokenTerms(
            ratio=log_ratio(live.logp.detach(), old).exp(),
            clipped_low=trained & token.clipped_low,
            clipped_high=trained & token.clipped_high,
            kept=kept,
            kl=kl_value,
            is_weight=is_weight,
            is_keep=is_keep,
        ),
    )


def _role(objective: Objective) -> str | None:
    return None if objective.select is None else objective.select.role


def _clean_live(live: Live, rows: Rows) -> Live:
    """The live tensors with 0 under the rows' mask, selected so that NaN there is harmless."""
    entropy = live.entropy
    return Live(
        logp=torch.where(rows.mask, live.logp, 0),
        entropy=None if entropy is None else torch.where(rows.mask, entropy, 0),
        mask=rows.mask,
    )


def _denominators(
    objective: Objective, live: Live, rows: Rows
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Old and engine log-probabilities, complete, clean and detached.

    On-policy the old ones are the live ones. Where the engine gave none, its are the old ones
    (ratio 1). In bypass mode the engine's are the old ones for every part of the loss.
    """
    logp = live.logp.detach()
    old = logp if rows.old_logp is None else torch.where(rows.mask, rows.old_logp.to(logp), 0)
    engine = old
    if rows.engine_logp is not None:
        known = rows.mask & rows.engine_logp.isfinite()
        engine = torch.where(known, rows.engine_logp.to(logp), old)
    return (engine if objective.surrogate.bypass else old), engine


def _correct(
    objective: Objective,
    rows: Rows,
    *,
    old: Float[Tensor, "B T"],
    engine: Float[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"] | None, Bool[Tensor, "B T"] | None]:
    """The engine correction: as shipped with the rows, or from this forward."""
    if objective.correction is None or rows.is_weight is not None:
        return rows.is_weight, rows.is_keep
    return objective.correction(old, engine, rows.mask & rows.scored[:, None])


def _kept(
    objective: Objective,
    live: Live,
    rows: Rows,
    *,
    old: Float[Tensor, "B T"],
    engine: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
) -> Bool[Tensor, "B T"]:
    """Tokens that keep and selection leave in the policy term."""
    kept = rows.mask
    if rows.selected is not None:
        chosen = {"keep": rows.selected, "drop": ~rows.selected}
        kept = kept & chosen.get(_role(objective) or "penalise", kept)
    if objective.keep is not None:
        judged = objective.keep(live, old_logp=old, engine_logp=engine, advantage=advantage)
        kept = kept & judged
    return kept


def _kl_sum(
    objective: Objective, live: Live, rows: Rows, old: Float[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T"] | None]:
    """Σ c·kl with gradient, and k3 per token for the log; (0, None) without a reference."""
    zero = live.logp.new_zeros(())
    if rows.ref_logp is None:
        return zero, None
    ref = torch.where(rows.mask, rows.ref_logp.to(live.logp), 0)
    value = k3(live.logp.detach(), ref)
    if objective.kl is None or not objective.kl.active:
        return zero, value
    terms = objective.kl.estimator(live.logp, old, ref)
    return (rows.kl_weight.to(live.logp) * terms).sum(), value


def _entropy_sum(live: Live, rows: Rows) -> Float[Tensor, ""]:
    """Σ c·H with gradient; 0 if the forward gave no entropy."""
    if live.entropy is None:
        return live.logp.new_zeros(())
    return (rows.kl_weight.to(live.logp) * live.entropy).sum()
