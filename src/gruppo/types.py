"""The records that travel between gruppo's layers, and the protocols of what users plug in.

Everything here is frozen: a new stage of the data is a new type, never a field filled in later.
This module knows no model, no tokenizer and no file format; it needs torch alone.

Shapes: ``P`` prompts drawn, ``G`` completions each (groups may differ in size), ``B`` rows
(completions of all groups, in group order), ``T`` completion positions only: ``logp[b, 0]`` is the
log-probability of the first *completion* token of row ``b``. ``K`` reward parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Finish = Literal["stop", "length", "abort", "limit", "error"]
Ended = Literal["environment", "length", "turns", "tokens", "abort", "error"]
Fault = Literal["completion", "grader"]

ZERO_TOL = 1e-6
"""Rewards of a group closer together than this are equal: such a group is dead.

Eight float32 rewards of 0.1 differ by about 1e-8 from their mean, and dividing that noise by its
own standard deviation would give advantages near 1.
"""


def is_live(rewards: Iterable[float | None], *, tol: float = ZERO_TOL) -> bool:
    """Whether a group's rewards differ by more than ``tol``, so that there is a signal.

    None stands for an unscored completion, which is left out.

    >>> is_live([1.0, None, 0.0]), is_live([1.0, None, 1.0]), is_live([1.0, None])
    (True, False, False)
    """
    scored = [reward for reward in rewards if reward is not None]
    return len(scored) >= 2 and max(scored) - min(scored) > tol


def is_task_live(scores: Iterable[Score]) -> bool:
    """`is_live` of the task metric, over the rows that have a total: no other is trained on.

    A row may be graded by the task and unscored, because another part of the reward failed.
    """
    return is_live(score.task for score in scores if score.total is not None)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. ``role`` is "system", "user", "assistant" or "tool" (a tool's result)."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A task for the policy, before tokenisation.

    ``id`` is unique in its data set and stable between runs (the held-out split depends on it).
    ``answer`` is the reference answer as text, ``info`` the row's other columns, ``source`` the
    name of the data set it came from (metrics are also given per source).
    """

    id: str
    prompt: tuple[Message, ...]
    answer: str | None = None
    info: Mapping[str, object] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids, and how many completions to draw from it.

    ``key`` seeds every sampled token: (run seed, draw index) in training. Two draws of one problem
    differ in the draw index. ``offset`` is the number of completion tokens drawn before, for a
    continuation under the same key. ``max_tokens`` bounds this request below the sampling's bound.
    """

    tokens: tuple[int, ...]
    num_samples: int
    key: tuple[int, ...]
    offset: int = 0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an engine draws. ``temperature = 0`` is greedy; ``top_k = 0`` and ``top_p = 1`` are off.

    ``stop_tokens`` end a completion and stay in it (they are trained); ``stop`` are strings that
    end it too: their tokens stay, their text is cut from ``Completion.text``.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """What happened in a completion's episode with an environment, as plain data.

    ``messages`` is the dialogue after the prompt: the policy's turns (role "assistant") and what
    the environment answered. ``calls`` are the policy's tool calls, ``failed_calls`` those of them
    that were malformed, refused, or raised a tool's error. ``reward`` is the environment's own
    verdict, None if it gives none. ``ended`` says what ended the episode: the "environment" (or a
    turn that asks it for nothing), the policy's "length", the limit on "turns" or on "tokens" (no
    room for an answer), an "abort" of the engine, or an "error" of the environment, which
    ``error`` then tells.
    """

    messages: tuple[Message, ...]
    ended: Ended
    calls: int = 0
    failed_calls: int = 0
    reward: float | None = None
    error: str | None = None

    @property
    def turns(self) -> int:
        """Number of the policy's turns."""
        return sum(message.role == "assistant" for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine drew: token ids exactly as sampled, never re-tokenised.

    ``logp`` [n] are natural-log probabilities under the *sampling* distribution (temperature and
    filters included; NaN where the engine gave none). ``mask`` [n] is False where a token is not
    the policy's own (a tool's, say). ``version`` [n] is the policy version that drew each token.
    ``finish`` is "stop" (an end token or stop string), "length" (ran out of ``max_tokens``),
    "abort", "limit" (an environment's limit) or "error" (the environment failed). Of an episode
    with an environment ``text`` is the policy's last turn; ``interaction`` tells the rest.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    mask: tuple[bool, ...]
    version: tuple[int, ...]
    text: str
    finish: Finish
    interaction: Interaction | None = None

    @property
    def own_tokens(self) -> tuple[int, ...]:
        """The tokens that the policy drew itself, without an environment's."""
        if all(self.mask):
            return self.tokens
        return tuple(t for t, own in zip(self.tokens, self.mask, strict=True) if own)

    @property
    def truncated(self) -> bool:
        """True if the completion was cut by the token budget."""
        return self.finish == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a score could not be computed as meant, and whose fault it was.

    ``fault = "completion"``: the completion made its grading fail (it is unparsable, oversize,
    exhausts time or memory); it scores the reward's declared minimum, because leaving it unscored
    (advantage 0) would be better for the policy than a wrong answer. ``fault = "grader"``: the
    reward itself failed; the completion is unscored.
    """

    kind: str
    fault: Fault
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The reward of one completion.

    ``total`` is what advantages are made of (shaping included), None if unscored. ``task`` is the
    unshaped task metric that filters, pass@k and health rules read. ``parts`` holds each reward
    function's raw value before weighting, ``counted`` what counted in the place of a raw value
    where a range or gate of the reward changed it (still before weighting). ``steps`` are
    process rewards ``(end, value)`` with ``end`` the exclusive token index where the step ends.
    """

    total: float | None
    task: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    counted: Mapping[str, float | None] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()
    error: Failure | None = None

    def counting(self, name: str) -> float | None:
        """What the part ``name`` counted as, before its weight; None if it gave no value."""
        return self.counted.get(name, self.parts.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All completions of one prompt instance, with their scores (one each, same order).

    ``baseline`` is the total reward of an extra greedy completion, where the objective asks for
    one (ReMax), as the sampled ones have theirs (shaping and truncation policy applied), else None.
    """

    problem: Problem
    prompt_tokens: tuple[int, ...]
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
    baseline: float | None = None

    def __post_init__(self) -> None:
        assert len(self.completions) == len(self.scores), "one score per completion"

    @property
    def pass_rate(self) -> float | None:
        """Mean task reward over the completions that the task graded; None if there is none."""
        scored = [score.task for score in self.scores if score.task is not None]
        return sum(scored) / len(scored) if scored else None

    def is_live(self, metric: Literal["task", "total"] = "task") -> bool:
        """Whether scored rewards differ by more than ``ZERO_TOL``, so that there is a signal."""
        if metric == "task":
            return is_task_live(self.scores)
        return is_live(score.total for score in self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The whole rollout batch as tensors, in group order; rewards in float64 on the host.

    Unscored rows have NaN in ``total`` / ``task``; a part that abstained has NaN in ``parts``,
    which hold what counted (``Score.counted`` where it differs from the raw value).
    ``mask`` is True on the tokens that are trained. ``part_weights`` [K] are the weights under
    which ``parts`` were summed into ``total`` (before shaping). ``steps[b]`` are process rewards.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    engine_logp: Float[Tensor, "B T"]
    group: Int[Tensor, "B"]
    total: Float[Tensor, "B"]
    task: Float[Tensor, "B"]
    parts: Float[Tensor, "B K"]
    part_names: tuple[str, ...]
    part_weights: Float[Tensor, "K"]
    length: Int[Tensor, "B"]
    truncated: Bool[Tensor, "B"]
    steps: tuple[tuple[tuple[int, float], ...], ...]
    baseline: Float[Tensor, "P"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Results of no-grad passes over a rollout; None means this objective did not ask for it."""

    old_logp: Float[Tensor, "B T"] | None = None
    ref_logp: Float[Tensor, "B T"] | None = None


@runtime_checkable
class Engine(Protocol):
    """Draws completions. Token ids in, token ids out; it knows no reward and no chat template."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Draw ``num_samples`` completions for every request, in the order of the requests."""
        ...

    def load(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Take new weights (None: they are shared with the policy) and their version number."""
        ...

    def close(self) -> None:
        """Free what the engine holds. Calling it twice is fine."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Draws whole completions of problems: with an engine alone, or with an environment too."""

    def draw(
        self, problems: Sequence[Problem], requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Draw ``num_samples`` completions for every request, which is of the same-placed problem.

        No completion has more than ``sampling.max_tokens`` tokens, an environment's included.
        """
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores a whole group. Returns one value per completion; None means "could not be graded"."""

    def __call__(
        self, problem: Problem, completions: Sequence[Completion]
    ) -> Sequence[float | Score | None]:
        """Score ``completions``, all drawn from ``problem``."""
        ...


@runtime_checkable
class Encode(Protocol):
    """Turns a chat into prompt token ids and knows which tokens end a completion."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """All token ids that end a completion."""
        ...

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the prompt's token ids, generation prompt included."""
        ...


@runtime_checkable
class Callback(Protocol):
    """Told of every finished step. A plain function of these three arguments is one."""

    def __call__(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Receive step number (from 1), its groups and its metrics."""
        ...


@runtime_checkable
class Listener(Protocol):
    """Told of every evaluation. A plain function of these two arguments is one."""

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Receive the metrics of an evaluation after ``step`` (0: before training)."""
        ...
