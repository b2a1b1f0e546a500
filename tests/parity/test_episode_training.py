"""Episodes of a real (tiny) model: log-probabilities, gradients, and what company changes."""

import dataclasses
import math

import pytest
import torch

from gruppo.engine import LocalEngine
from gruppo.environment import Calculator, Episodes, GuessingGame, Limits
from gruppo.environment.calls import Call
from gruppo.model import Encoder, load
from gruppo.objective import Live, compute_loss
from gruppo.reward import Part, Random, RewardSet
from gruppo.rollout import RolloutSettings, tensorise
from gruppo.types import Evidence, Group, Request, Sampling, Score
from support.dialogues import problem
from support.loss_steps import rows_for_rollout
from support.update_steps import named, policy_of, targets_of, wide_model

SAMPLING = Sampling(max_tokens=220, stop_tokens=(256,), stop=tuple("nopqrstuvwxyz"))
REWARD = RewardSet((Part(name="any", reward=Random()),))


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    torch.set_num_threads(1)
    return load(str(tiny_folder))


class Recording:
    """An engine that remembers what the model was given and what it drew."""

    def __init__(self, engine):
        self.engine, self.seen = engine, []

    def generate(self, requests, sampling):
        drawn = self.engine.generate(requests, sampling)
        for request, rows in zip(requests, drawn, strict=True):
            self.seen += [(request.tokens, row.tokens) for row in rows]
        return drawn

    def load(self, weights, version): ...

    def close(self): ...


def play(loaded, names, samples=3, environment=None):
    """Groups of completions by problem, and the engine that drew them."""
    environment = environment or GuessingGame()
    encoder = Encoder(
        loaded.tokenizer, tools=environment.tools, instructions=environment.instructions
    )
    engine = Recording(
        LocalEngine(loaded.model, encoder.decode, pad_token=encoder.pad_token, max_rows=5)
    )
    made = Episodes(
        engine=engine,
        environment=environment,
        encoder=encoder,
        limits=Limits(max_turns=3),
        context=512,
    )
    problems = [problem(name, answer="5") for name in names]
    requests = [
        Request(tokens=encoder.encode(p.prompt), num_samples=samples, key=(7, ord(p.id)))
        for p in problems
    ]
    drawn = made.draw(problems, requests, SAMPLING)
    groups = [
        Group(
            problem=p,
            prompt_tokens=request.tokens,
            completions=rows,
            scores=tuple(Score(total=float(n % 2), task=float(n % 2)) for n in range(samples)),
        )
        for p, request, rows in zip(problems, requests, drawn, strict=True)
    ]
    return groups, engine


@pytest.fixture(scope="module")
def played(loaded):
    return play(loaded, "ab")


def test_every_turn_is_what_was_drawn_after_all_that_stands_before_it(loaded, played, monkeypatch):
    """Cut at the mask: the model was given exactly what stands before a turn, and drew the turn."""
    call = [Call("calculator", {"expression": "2**9"})]
    monkeypatch.setattr("gruppo.environment.tools.find_calls", lambda text, form: call)
    # the tool's schema, in bytes, leaves room for two turns
    for most, (groups, engine) in (3, played), (2, play(loaded, "c", environment=Calculator())):
        turns = [row.interaction.turns for group in groups for row in group.completions]
        assert max(turns) == most
        for group in groups:
            for row in group.completions:
                found = cut(group.prompt_tokens, row)
                assert len(found) == row.interaction.turns
                assert set(found) <= set(engine.seen)


def cut(prompt, row):
    """The turns of a completion: what stands before each, and its tokens."""
    starts = [at for at, own in enumerate(row.mask) if own and (at == 0 or not row.mask[at - 1])]
    found = []
    for start in starts:
        end = next((at for at in range(start, len(row.mask)) if not row.mask[at]), len(row.mask))
        found.append(((*prompt, *row.tokens[:start]), row.tokens[start:end]))
    return found


def test_log_probabilities_are_those_of_one_forward_over_the_whole(loaded, played):
    for group in played[0]:
        for row in group.completions:
            ids = torch.tensor([[*group.prompt_tokens, *row.tokens]])
            with torch.no_grad():
                logits = loaded.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            start = len(group.prompt_tokens)
            for at, (token, logp, own) in enumerate(
                zip(row.tokens, row.logp, row.mask, strict=True)
            ):
                expected = float(logits[start + at - 1, token])
                assert math.isnan(logp) if not own else logp == pytest.approx(expected, abs=2e-5)


def test_what_is_drawn_does_not_depend_on_the_company(loaded, played):
    alone = {g.problem.id: g for name in "ab" for g in play(loaded, name)[0]}
    fewer = {g.problem.id: g for g in play(loaded, "ba", samples=2)[0]}
    for group in played[0]:
        for other, count in ((alone, 3), (fewer, 2)):
            rows = other[group.problem.id].completions
            for ours, theirs in zip(group.completions[:count], rows, strict=True):
                assert ours.tokens == theirs.tokens
                assert (ours.mask, ours.interaction) == (theirs.mask, theirs.interaction)


@pytest.mark.parametrize("preset", ["default", "gspo", "cispo", "rpp", "dppo", "mis"])
def test_tokens_of_the_environment_have_exactly_no_gradient(played, preset):
    rollout = tensorise(played[0], REWARD, RolloutSettings(max_tokens=220))
    objective = dataclasses.replace(named(preset), kl=None, select=None)
    credit = objective.credit
    if "ref_logp" in credit.needs or "old_logp" in credit.needs:
        zeros = torch.zeros(rollout.tokens.shape, dtype=torch.float64)
        evidence = Evidence(old_logp=zeros, ref_logp=zeros)
    else:
        evidence = Evidence()
    advantage = credit(rollout, evidence)
    wide = advantage if advantage.dim() == 2 else advantage[:, None].expand(rollout.mask.shape)
    rows = rows_for_rollout(objective, rollout, wide.double().contiguous())
    logp = rollout.engine_logp.double().requires_grad_()  # NaN where the environment spoke
    entropy = torch.full_like(rollout.engine_logp, math.nan).double()
    live = Live(logp=logp, entropy=entropy.where(~rollout.mask, 1.0), mask=rollout.mask)
    loss = compute_loss(objective, live, rows, objective.coefficients)
    loss.value.backward()
    assert bool((~rollout.mask).any())
    assert torch.isfinite(loss.value)
    assert bool((logp.grad[~rollout.mask] == 0).all())
    signal = rollout.mask & (wide != 0)
    assert bool((logp.grad[signal] != 0).all())


@pytest.mark.parametrize("packed", [True, False])
def test_the_gradient_is_that_of_the_policys_tokens_alone(tiny_folder, played, packed):
    """float64: the policy's update equals a loss written out over the own tokens."""
    from gruppo.settings import UpdateSettings
    from gruppo.update import OptimizerStep

    rollout = tensorise(played[0], REWARD, RolloutSettings(max_tokens=220))
    objective = named("default")
    policy = policy_of(wide_model(tiny_folder), packed=packed)
    targets = targets_of(policy, objective, rollout)
    step = OptimizerStep(policy, objective, targets, objective.coefficients, UpdateSettings())
    step.accumulate(torch.arange(len(rollout.group)), first=True)
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}

    model = wide_model(tiny_folder)
    weight = objective.weights(rollout.mask, rollout.group, rows_for_rollout_totals(rollout))
    loss = torch.zeros((), dtype=torch.float64)
    for row, group in enumerate(rollout.group.tolist()):
        prompt = rollout.prompts[group]
        size = int(rollout.length[row])
        tokens = rollout.tokens[row, :size]
        ids = torch.tensor([[*prompt, *tokens.tolist()]])
        logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        own = logp[len(prompt) - 1 : -1].gather(-1, tokens[:, None])[:, 0]
        chosen = rollout.mask[row, :size]
        # ratio 1: the gradient of the surrogate is A times that of logp
        loss = loss - (weight[row, :size] * targets.advantage[row] * own)[chosen].sum()
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-9, rtol=1e-6)


def rows_for_rollout_totals(rollout):
    from gruppo.objective import Totals

    return Totals.of(rollout.mask, rollout.group)
