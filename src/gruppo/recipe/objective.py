"""The ``[objective]`` section: a preset and what a recipe changes of it.

Every part is the mathematics' own record, told apart by ``kind``, or a custom one. Only records
that hold another part are repeated here, because there the types must list what may stand inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator

from gruppo import objective as math
from gruppo.objective import Objective
from gruppo.recipe.custom import Custom

_FORBID = {"extra": "forbid"}

KLEstimator = Annotated[
    math.KLNaive
    | math.KLUnbiased
    | math.KLStraightThrough
    | math.KLSquare
    | math.KLSequenceSquare
    | Custom,
    Discriminator("kind"),
]


def built(part: Any) -> Any:
    """A part of the recipe as the mathematics wants it: custom ones imported, wrappers opened."""
    return part.build() if isinstance(part, Custom | KLInReward | Reweight | KL) else part


@dataclass(frozen=True, slots=True, kw_only=True)
class KLInReward:
    """``gruppo.objective.KLInReward`` around any plain estimator: ``credit``, ``beta``."""

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["kl_in_reward"] = "kl_in_reward"
    credit: Annotated[math.PlainCredit | Custom, Discriminator("kind")]
    beta: float

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> math.KLInReward:
        """Make the estimator."""
        return math.KLInReward(credit=built(self.credit), beta=self.beta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reweight:
    """``gruppo.objective.Reweight`` around any other estimator (``credit``).

    ``clip`` bounds advantages, ``pos_scale`` and ``neg_scale`` multiply those of either sign.
    """

    __pydantic_config__: ClassVar = _FORBID

    kind: Literal["reweight"] = "reweight"
    credit: Annotated[math.PlainCredit | KLInReward | Custom, Discriminator("kind")]
    clip: float | None = None
    pos_scale: float = 1.0
    neg_scale: float = 1.0

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> math.Reweight:
        """Make the estimator."""
        return math.Reweight(
            credit=built(self.credit),
            clip=self.clip,
            pos_scale=self.pos_scale,
            neg_scale=self.neg_scale,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KL:
    """``gruppo.objective.KLTerm``: ``beta``, ``estimator``, and ``adaptive`` control of beta."""

    __pydantic_config__: ClassVar = _FORBID

    beta: float
    estimator: KLEstimator = field(default_factory=math.KLUnbiased)
    adaptive: math.AdaptiveKL | None = None

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> math.KLTerm:
        """Make the term."""
        return math.KLTerm(beta=self.beta, estimator=built(self.estimator), adaptive=self.adaptive)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSection:
    """The objective: the parts of a ``preset``, each of which the recipe may change or replace.

    ``credit`` makes advantages of rewards, ``surrogate`` a loss of every token, ``weights`` one
    number of all tokens. Optional: ``select`` chooses tokens of a whole step, ``keep`` those of a
    row, ``correction`` reweights for an engine that differs, ``kl`` and ``entropy`` add their
    terms. Each as in ``gruppo.objective.Objective``; defaults are those of the preset "default".
    """

    __pydantic_config__: ClassVar = _FORBID

    preset: str = "default"
    credit: Annotated[math.PlainCredit | KLInReward | Reweight | Custom, Discriminator("kind")] = (
        field(default_factory=math.Grpo)
    )
    surrogate: Annotated[math.PlainSurrogate | Custom, Discriminator("kind")] = field(
        default_factory=math.PpoClip
    )
    weights: Annotated[math.PlainWeights | Custom, Discriminator("kind")] = field(
        default_factory=math.TokenMean
    )
    select: Annotated[math.PlainSelect | Custom, Discriminator("kind")] | None = None
    keep: Annotated[math.OffPolicySequenceMask | Custom, Discriminator("kind")] | None = None
    correction: Annotated[math.PlainCorrection | Custom, Discriminator("kind")] | None = None
    kl: KL | None = None
    entropy: math.EntropyTerm | None = None

    def __post_init__(self) -> None:
        self.build(max_tokens=1)

    def build(self, *, max_tokens: int) -> Objective:
        """Make the objective; ``max_tokens`` is the constant's length where none is given.

        Raises ValueError for parts that make no sense together.
        """
        weights = built(self.weights)
        if isinstance(weights, math.Constant) and weights.length is None:
            weights = replace(weights, length=max_tokens)
        return Objective(
            credit=built(self.credit),
            surrogate=built(self.surrogate),
            weights=weights,
            select=built(self.select),
            keep=built(self.keep),
            correction=built(self.correction),
            kl=built(self.kl),
            entropy=self.entropy,
        )
