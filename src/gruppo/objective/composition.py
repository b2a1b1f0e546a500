"""The objective: which parts make up the loss, and whether they fit together.

``Objective`` only names its parts and what evidence they need; ``loss.py`` computes. Combinations
that cannot mean anything are refused when the objective is made, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gruppo.objective.correction import (
    Correction,
    GeometricMask,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenTruncate,
)
from gruppo.objective.credit import (
    Credit,
    KLInReward,
    PlainCredit,
    Process,
    ReinforcePP,
    Reweight,
    innermost,
)
from gruppo.objective.entropy import EntropyTerm
from gruppo.objective.keep import (
    ClipCov,
    Keep,
    KlCovTokens,
    OffPolicySequenceMask,
    Select,
    TopEntropy,
)
from gruppo.objective.kl import KLTerm
from gruppo.objective.sequence import Gmpo, Gspo, GspoToken, Luspo, RlooSeq, Vespo
from gruppo.objective.surrogate import Cispo, Importance, PpoClip, Reinforce, Sapo, Surrogate
from gruppo.objective.trust import DppoKl, DppoTv, Dro, KlCov
from gruppo.objective.weights import (
    Constant,
    LocalTokenMean,
    PromptMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    TokenMean,
    Weights,
)

PlainSurrogate = (
    PpoClip
    | Reinforce
    | Importance
    | Cispo
    | Sapo
    | Gspo
    | GspoToken
    | Gmpo
    | Luspo
    | RlooSeq
    | Vespo
    | DppoTv
    | DppoKl
    | KlCov
    | Dro
)
PlainWeights = (
    TokenMean | SeqMeanTokenMean | SeqMeanTokenSum | Constant | PromptMean | LocalTokenMean
)
PlainSelect = TopEntropy | ClipCov | KlCovTokens
PlainCorrection = TokenTruncate | TokenMask | SequenceTruncate | SequenceMask | GeometricMask


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """β and α in force for one optimizer step (controllers may move them between steps)."""

    kl: float = 0.0
    entropy: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: L = Σ c·w·keep·surrogate + β·Σ c·kl - α·Σ c·H.

    Args:
        credit: Rewards to advantages.
        surrogate: Advantages and log-probabilities to a loss per token or row.
        weights: The coefficients c, from the counts of the whole optimizer step.
        select: Tokens chosen once per optimizer step: kept, dropped or penalised.
        keep: Tokens judged in the training forward.
        correction: The weights w (and rejections) for an engine that is not the trainer.
        kl: Term towards the reference model.
        entropy: Entropy bonus.

    Raises:
        ValueError: the parts do not fit together; the text says why.

    Example:
        >>> from gruppo.objective import Grpo, Gspo, PpoClip, TokenMean
        >>> Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean()).needs_reference
        False
        >>> Objective(credit=Grpo(), surrogate=Gspo(), weights=TokenMean())
        Traceback (most recent call last):
        ...
        ValueError: weights = TokenMean(kind='token_mean'): surrogate Gspo has one loss per ...
    """

    credit: PlainCredit | KLInReward | Reweight | Credit
    surrogate: PlainSurrogate | Surrogate
    weights: PlainWeights | Weights
    select: PlainSelect | Select | None = None
    keep: OffPolicySequenceMask | Keep | None = None
    correction: PlainCorrection | Correction | None = None
    kl: KLTerm | None = None
    entropy: EntropyTerm | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        for check in (
            _refuse_unknown_needs,
            _refuse_row_loss_weights,
            _refuse_row_loss_parts,
            _refuse_double_correction,
            _refuse_selection_mismatch,
        ):
            check(self)

    @property
    def coefficients(self) -> Coefficients:
        """β and α of the first step; controllers move them from there."""
        kl, entropy = self.kl, self.entropy
        beta, alpha = kl.beta if kl else 0.0, entropy.coef if entropy else 0.0
        return Coefficients(
            kl=kl.adaptive.start(beta)[1] if kl and kl.adaptive else beta,
            entropy=entropy.adaptive.start(alpha)[1] if entropy and entropy.adaptive else alpha,
        )

    @property
    def needs_reference(self) -> bool:
        """Are reference log-probabilities read, by the loss or by the credit."""
        return (self.kl is not None and self.kl.active) or "ref_logp" in self.credit.needs

    @property
    def ratio_of_rows(self) -> bool:
        """Does the loss have one importance ratio per completion, not one per token."""
        return self.surrogate.level == "sequence" or isinstance(self.surrogate, GspoToken)

    @property
    def needs_greedy(self) -> bool:
        """Does the credit compare with a greedy completion of every prompt."""
        return "greedy" in self.credit.needs

    @property
    def acts_without_advantage(self) -> bool:
        """May rows whose advantages are all 0 have a policy gradient; then none may be skipped.

        True for losses with a penalty of their own, and, to be safe, for those from outside.
        """
        penalised = isinstance(self.surrogate, DppoKl | Dro | KlCov)
        return penalised or not isinstance(self.surrogate, PlainSurrogate)

    def needs_old(self, num_updates: int) -> bool:
        """Must old log-probabilities be computed in a pass of their own.

        With one update per rollout they are those of the training forward itself, so no pass is
        made unless the credit reads them or the correction is normalised over the whole step.
        In bypass mode the engine's take their place.

        Args:
            num_updates: Optimizer steps per rollout batch.
        """
        if "old_logp" in self.credit.needs:
            return True
        if self.correction is not None and self.correction.per_step:
            return True
        return num_updates > 1 and not self.surrogate.bypass


def _name(part: object) -> str:
    """The class of a part, for messages."""
    return type(part).__name__


def _refuse_unknown_needs(objective: Objective) -> None:
    """A credit can read what some pass gives, and nothing else."""
    unknown = sorted(objective.credit.needs - {"old_logp", "ref_logp", "greedy"})
    if unknown:
        raise ValueError(
            f"credit = {objective.credit!r}: it needs {unknown[0]}, which no pass gives; there are "
            "old_logp, ref_logp and greedy"
        )


def _refuse_row_loss_weights(objective: Objective) -> None:
    """One loss per row has one meaning only: the mean over rows."""
    if objective.surrogate.level != "sequence":
        return
    if not isinstance(objective.weights, SeqMeanTokenMean):
        raise ValueError(
            f"weights = {objective.weights!r}: surrogate {_name(objective.surrogate)} has one "
            "loss per completion, which enters as the mean over completions; use "
            "SeqMeanTokenMean()"
        )


def _refuse_row_loss_parts(objective: Objective) -> None:
    """Advantages or selections per token would be averaged away by a loss per row."""
    surrogate = objective.surrogate
    if surrogate.level != "sequence":
        return
    if objective.select is not None:
        raise ValueError(
            f"select = {objective.select!r}: it chooses tokens, but surrogate "
            f"{_name(surrogate)} has one loss per completion; use a token-level surrogate"
        )
    if _varies_in_row(objective.credit):
        raise ValueError(
            f"credit = {objective.credit!r}: it gives every token its own advantage, which "
            f"surrogate {_name(surrogate)} would average over the completion; use GspoToken() "
            "or another token-level surrogate"
        )


def _varies_in_row(credit: object) -> bool:
    """Do the advantages of one completion differ between its tokens."""
    inner = innermost(credit)
    if isinstance(inner, ReinforcePP):
        return inner.beta > 0 or inner.gamma < 1
    return isinstance(inner, Process)


def _refuse_double_correction(objective: Objective) -> None:
    """The mismatch between engine and trainer may be corrected once."""
    if objective.correction is None:
        return
    if objective.surrogate.bypass:
        raise ValueError(
            f"correction = {objective.correction!r}: surrogate {_name(objective.surrogate)} "
            "already takes its ratio against the engine (bypass), so the mismatch would be "
            "counted twice; leave correction out"
        )
    if isinstance(objective.surrogate, Vespo):
        raise ValueError(
            f"correction = {objective.correction!r}: Vespo weighs whole completions, mismatch "
            "included; leave correction out and set Vespo(bypass=True)"
        )


def _refuse_selection_mismatch(objective: Objective) -> None:
    """A selection and the surrogate that acts on it belong together."""
    select, surrogate = objective.select, objective.surrogate
    if isinstance(select, ClipCov):
        if not isinstance(surrogate, PpoClip):
            raise ValueError(
                f"select = {select!r}: Clip-Cov drops tokens that the clip range left free, but "
                f"surrogate {_name(surrogate)} has none; use PpoClip(eps_low=1.0, eps_high=1.0)"
            )
        if (select.eps_low, select.eps_high) != (surrogate.eps_low, surrogate.upper):
            raise ValueError(
                f"select = {select!r}: its clip range differs from the surrogate's, "
                f"({surrogate.eps_low}, {surrogate.upper}); give both the same"
            )
    penalises = select is not None and select.role == "penalise"
    if isinstance(surrogate, KlCov) and not penalises:
        raise ValueError(
            f"select = {select!r}: surrogate KlCov penalises selected tokens, so something must "
            "select them; use select=KlCovTokens()"
        )
    if isinstance(select, KlCovTokens) and not isinstance(surrogate, KlCov):
        raise ValueError(
            f"select = {select!r}: it chooses tokens to be penalised, which surrogate "
            f"{_name(surrogate)} does not do; use surrogate=KlCov()"
        )
