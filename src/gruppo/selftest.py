"""Start-up self-test: seconds before step 1 that find what would otherwise spoil the whole run.

It draws a few short completions with the run's own engine and policy and checks that they agree
about the tokens, their probabilities, the end token and the weights' version, and that the
gradient does not depend on how rows are split. It moves no weight and no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gruppo.errors import NumericError
from gruppo.objective import Coefficients, Grpo, Live, Objective, PpoClip, TokenMean
from gruppo.policy import Policy
from gruppo.rollout import Rollouts, tensorise
from gruppo.types import Completion, Evidence, Group, Request, Rollout, Score
from gruppo.update import OptimizerStep, Targets, UpdateSettings

TEST_KEY = -2
"""First component of the test's sampling keys; training's is the run's seed, not negative."""

MAX_TOKENS = 12
GROUP_SIZE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Largest differences that rounding explains.

    float32: kernels sum in different orders. bfloat16 has 8 bits of mantissa: single tokens
    differ by a few per cent between a cached and an uncached forward pass.
    """

    mean_logp: float
    gradient: float

    @staticmethod
    def of(dtype: torch.dtype) -> Tolerance:
        """Return the tolerance for computing in ``dtype``."""
        if dtype in (torch.bfloat16, torch.float16):
            return Tolerance(mean_logp=0.1, gradient=0.05)
        return Tolerance(mean_logp=1e-3, gradient=1e-3)


def self_test(policy: Policy, rollouts: Rollouts) -> dict[str, float]:
    """Check the run's parts against each other; return the measured differences.

    Raises:
        NumericError: something does not agree; the text says what and where to look.
    """
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return _measure(policy, rollouts)


def _measure(policy: Policy, rollouts: Rollouts) -> dict[str, float]:
    tolerance = Tolerance.of(policy.compute_dtype)
    groups = _draw(rollouts)
    check_formulas()
    check_tokens(groups, rollouts, policy.version)
    settings = replace(rollouts.settings, truncation="none")
    rollout = tensorise(groups, rollouts.reward, settings)
    if int(rollout.mask.sum()) == 0:
        return {}
    mismatch = check_probabilities(policy, rollout, tolerance)
    if _drops_adapter(policy):  # the recipe asks for a training pass that is random
        return {"selftest/mismatch": mismatch}
    check_passes(policy, rollout, tolerance)
    split = check_split(policy, rollout, tolerance)
    return {"selftest/mismatch": mismatch, "selftest/split": split}


def _drops_adapter(policy: Policy) -> bool:
    """Whether the adapter has dropout; that of the model itself is off, or is a mistake."""
    return any(
        "lora_dropout" in name and isinstance(module, nn.Dropout) and module.p > 0
        for name, module in policy.model.named_modules()
    )


def _draw(rollouts: Rollouts) -> list[Group]:
    """Two prompts with two short completions each, scored +1 and -1 so that both have a signal."""
    before = rollouts.state()
    problems = rollouts.stream.draw(2)
    rollouts.restore(before)
    prompts = [rollouts.encoder.encode(problem.prompt) for problem in problems]
    sampling = rollouts.settings.sampling(rollouts.encoder.stop_tokens)
    requests = [
        Request(tokens=tokens, num_samples=GROUP_SIZE, key=(TEST_KEY, index))
        for index, tokens in enumerate(prompts)
    ]
    limit = min(MAX_TOKENS, sampling.max_tokens)
    # the filters off: the trainer's probabilities are those of the whole distribution
    plain = replace(sampling, max_tokens=limit, top_p=1.0, top_k=0, min_p=0.0)
    drawn = rollouts.engine.generate(requests, plain)
    signs = (1.0, -1.0)
    return [
        Group(
            problem=problem,
            prompt_tokens=tokens,
            completions=rows,
            scores=tuple(Score(total=sign, task=sign) for sign in signs),
        )
        for problem, tokens, rows in zip(problems, prompts, drawn, strict=True)
    ]


def check_formulas() -> None:
    """The advantage, and the clipped loss with its gradient, of cases worked out by hand.

    Rewards (1, 0, 0, 1): mean 0.5, standard deviation 0.57735, so A = ±0.5 / 0.57745. Ratios 1.3
    and 0.5 for A = 1 and for A = -1, clipped to [0.8, 1.28] where that lowers the gain.
    """
    rollout = _hand_rollout([1.0, 0.0, 0.0, 1.0])
    advantage = Grpo()(rollout, Evidence())
    expected = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64) * 0.5 / 0.5774502692
    _require(
        bool((advantage - expected).abs().max() < 1e-6),
        f"the advantages of rewards 1, 0, 0, 1 are {advantage.tolist()}, not ±0.865875: this "
        "installation computes wrongly (a broken torch build?)",
    )
    ratio = torch.tensor([[1.3], [0.5], [0.5], [1.3]], dtype=torch.float64)
    sign = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    live = Live(logp=logp, entropy=None, mask=torch.ones(4, 1, dtype=torch.bool))
    zero = torch.zeros(4, 1, dtype=torch.float64)
    loss = PpoClip()(live, old_logp=zero, engine_logp=zero, advantage=sign, selected=None).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    found = [*loss.flatten().tolist(), *gradient.flatten().tolist()]
    hand = [-1.28, -0.5, 0.8, 1.3, 0.0, -0.5, 0.0, 1.3]
    _require(
        all(abs(one - other) < 1e-9 for one, other in zip(found, hand, strict=True)),
        f"clipped losses and gradients of four cases are {found}, not {hand}: this installation "
        "computes wrongly (a broken torch build?)",
    )


def _hand_rollout(total: list[float]) -> Rollout:
    rows = len(total)
    rewards = torch.tensor(total, dtype=torch.float64)
    return Rollout(
        prompts=((1,),),
        tokens=torch.ones(rows, 1, dtype=torch.long),
        mask=torch.ones(rows, 1, dtype=torch.bool),
        engine_logp=torch.zeros(rows, 1),
        group=torch.zeros(rows, dtype=torch.long),
        total=rewards,
        task=rewards,
        parts=rewards[:, None],
        part_names=("task",),
        part_weights=torch.ones(1, dtype=torch.float64),
        length=torch.ones(rows, dtype=torch.long),
        truncated=torch.zeros(rows, dtype=torch.bool),
        steps=((),) * rows,
        baseline=None,
    )


def check_tokens(groups: list[Group], rollouts: Rollouts, version: int) -> None:
    """Version handshake; the end token is trained; no other row's token is."""
    stops = set(rollouts.encoder.stop_tokens)
    for group in groups:
        for row in group.completions:
            _require(
                set(row.version) <= {version},
                f"the engine drew with weights of version {sorted(set(row.version))}, the "
                f"policy's is {version}: the engine does not have the present weights",
            )
            _require(
                len(row.logp) == len(row.tokens) == len(row.mask),
                "the engine returned other numbers of tokens, log-probabilities and mask values",
            )
            _check_end(row, stops)


def _check_end(row: Completion, stops: set[int]) -> None:
    inside = [token for token in row.tokens[:-1] if token in stops]
    _require(
        not inside,
        f"a completion goes on after the end token {inside[:1]}: the engine does not stop where "
        "the tokenizer's end tokens say; compare generation_config.json and the chat template",
    )
    if row.finish == "stop" and row.tokens and row.tokens[-1] in stops:
        _require(row.mask[-1], "the end token is not trained: completions would grow without end")


def check_probabilities(policy: Policy, rollout: Rollout, tolerance: Tolerance) -> float:
    """Engine and scoring pass give the same tokens the same log-probability."""
    prompts = [rollout.prompts[int(group)] for group in rollout.group]
    old = policy.old_logp(prompts, rollout.tokens, rollout.length).logp.cpu()
    known = rollout.mask & ~rollout.engine_logp.isnan()
    gap = (old - rollout.engine_logp)[known]
    mismatch = float(gap.abs().mean()) if gap.numel() else math.nan
    _require(
        not mismatch > tolerance.mean_logp,
        f"engine and trainer differ by {mismatch:.4f} in the mean log-probability of the same "
        "tokens: do both use the same weights, temperature and sampling filters?",
    )
    return mismatch


def check_passes(policy: Policy, rollout: Rollout, tolerance: Tolerance) -> None:
    """Scoring pass and training pass give the same tokens the same log-probability."""
    prompts = [rollout.prompts[int(group)] for group in rollout.group]
    old = policy.old_logp(prompts, rollout.tokens, rollout.length).logp
    with torch.enable_grad():
        live = policy.logp(prompts, rollout.tokens, rollout.length).logp.detach()
    policy.discard_gradient()
    apart = float((old - live).cpu()[rollout.mask].abs().max())
    _require(
        apart <= 2 * tolerance.mean_logp,
        f"the scoring and the training pass of the same weights differ by {apart:.4f} in a "
        "log-probability: is dropout on?",
    )


def check_split(policy: Policy, rollout: Rollout, tolerance: Tolerance) -> float:
    """The gradient of all rows at once equals that of one row at a time."""
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())
    # one sign for all: equal completions of opposite signs would cancel, and leave rounding alone
    ones = torch.ones(len(rollout.group), dtype=torch.float64)
    targets = Targets(rollout=rollout, evidence=Evidence(), advantage=ones)

    def gradient(budget: int) -> Tensor:
        how = UpdateSettings(tokens_per_microbatch=budget)
        step = OptimizerStep(policy, objective, targets, Coefficients(kl=0.0, entropy=0.0), how)
        step.accumulate(torch.arange(len(rollout.group)), first=True)
        grads = [sample(p.grad) for p in policy.model.parameters() if p.grad is not None]
        policy.discard_gradient()
        return torch.cat(grads)

    return _compare(gradient, tolerance)


def sample(gradient: Tensor, size: int = 4096) -> Tensor:
    """Evenly spaced entries of a gradient: enough to compare, and no second copy of the model."""
    flat = gradient.flatten()
    return flat[:: max(1, flat.numel() // size)].float().clone()


def _compare(gradient: Callable[[int], Tensor], tolerance: Tolerance) -> float:
    whole, single = gradient(2**40), gradient(1)
    norm = float(whole.norm())
    apart = float((whole - single).norm()) / norm if norm else 0.0
    _require(
        math.isfinite(norm),
        "the gradient of the first few completions is not finite: is the model's checkpoint whole?",
    )
    _require(
        apart <= tolerance.gradient,
        f"the gradient depends on the micro-batch split (relative difference {apart:.2e}): "
        "padding or attention masks are not honoured by this model",
    )
    return apart


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise NumericError(f"self-test: {problem}")
