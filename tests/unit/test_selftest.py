"""The self-test: passes on a healthy model and leaves no trace; finds what is wrong."""

import dataclasses

import pytest
import torch
from torch import nn

from gruppo.data.stream import ProblemStream
from gruppo.engine.local import LocalEngine
from gruppo.errors import NumericError
from gruppo.model import Encoder, Lora, attach, load
from gruppo.objective import Grpo, PpoClip
from gruppo.policy import Optim, Policy
from gruppo.reward.base import Part, RewardSet
from gruppo.rollout import Rollouts, RolloutSettings, tensorise
from gruppo.selftest import Tolerance, _draw, check_formulas, check_split, self_test
from gruppo.types import Message, Problem

PROBLEMS = [Problem(id=c, prompt=(Message("user", c * n),)) for n, c in enumerate("abcd", 1)]
STRICT = Tolerance.of(torch.float32)


class Changed:
    """An engine whose completions are changed on the way out."""

    def __init__(self, engine, change):
        self.engine, self.change = engine, change

    def generate(self, requests, sampling):
        drawn = self.engine.generate(requests, sampling)
        return [
            tuple(dataclasses.replace(row, **self.change(row)) for row in rows) for rows in drawn
        ]

    def load(self, weights, version): ...

    def close(self): ...


def parts(folder, *, change=None, temperature=1.0, lora=None, packing=True):
    torch.manual_seed(0)
    loaded = load(str(folder))
    model = attach(loaded.model, lora) if lora else loaded.model
    encoder = Encoder(loaded.tokenizer)
    drawn = loaded.model  # the adapter's layers are put into it
    engine = LocalEngine(drawn, encoder.decode, pad_token=encoder.pad_token)
    policy = Policy(model, optim=Optim(), total_updates=1, temperature=temperature, packing=packing)
    rollouts = Rollouts(
        engine=Changed(engine, change) if change else engine,
        encoder=encoder,
        reward=RewardSet((Part(name="zero", reward=lambda p, rows: [0.0] * len(rows)),)),
        stream=ProblemStream([(PROBLEMS, 1.0)], seed=0),
        settings=RolloutSettings(max_tokens=8),
        seed=0,
    )
    return policy, rollouts


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.5)])
def test_a_healthy_model_passes_and_nothing_is_moved(tiny_folder, lora):
    policy, rollouts = parts(tiny_folder, lora=lora)
    if lora:  # so that the adapter, and its dropout, do something
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.5)
    rollouts.stream.draw(3)
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    state, rng = rollouts.state(), torch.get_rng_state()
    seen = self_test(policy, rollouts)
    assert 0 <= seen["selftest/mismatch"] < 1e-5
    assert ("selftest/split" in seen) == (lora is None)
    assert seen.get("selftest/split", 0.0) < 1e-5
    assert rollouts.state() == state
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p, weights[name]) for name, p in policy.model.named_parameters())
    assert [p.grad for p in policy.model.parameters()] == [None] * len(weights)
    assert (policy.version, policy.model.training) == (0, False)


def ends_untrained(row):
    """The completion is said to end with its end token, which is not trained."""
    last = len(row.tokens) - 1
    return {
        "tokens": (*row.tokens[:-1], 256),
        "mask": tuple(at < last for at in range(len(row.mask))),
        "finish": "stop",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"version": (7,) * len(row.tokens)}, "version .7., the policy's is 0"),
        (lambda row: {"mask": row.mask[:-1]}, "other numbers of tokens"),
        (lambda row: {"tokens": (256, *row.tokens[1:])}, "goes on after the end token"),
        (ends_untrained, "end token is not trained"),
        (lambda row: {"logp": tuple(x - 0.01 for x in row.logp)}, "differ by 0.0100 in the mean"),
    ],
)
def test_a_wrong_engine_is_found(tiny_folder, change, message):
    policy, rollouts = parts(tiny_folder, change=change)
    with pytest.raises(NumericError, match=message):
        self_test(policy, rollouts)


def test_another_temperature_is_found(tiny_folder):
    policy, rollouts = parts(tiny_folder, temperature=0.7)
    with pytest.raises(NumericError, match="do both use the same weights, temperature"):
        self_test(policy, rollouts)


def test_dropout_is_found(tiny_folder):
    policy, rollouts = parts(tiny_folder)
    policy.model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    policy.model.eval()
    with pytest.raises(NumericError, match="is dropout on"):
        self_test(policy, rollouts)


class SeesPadding(nn.Module):
    """A layer that mixes in the mean of all positions, padding and future included."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, states):
        return self.norm(states + states.mean(dim=1, keepdim=True))


def test_a_model_that_sees_padding_is_found(tiny_folder):
    policy, rollouts = parts(tiny_folder, packing=False)
    rollout = tensorise(_draw(rollouts), rollouts.reward, rollouts.settings)
    assert check_split(policy, rollout, STRICT) < 1e-5
    policy.model.model.norm = SeesPadding(policy.model.model.norm)
    with pytest.raises(NumericError, match="depends on the micro-batch split"):
        check_split(policy, rollout, STRICT)
    with pytest.raises(NumericError, match="engine and trainer differ"):
        self_test(policy, rollouts)


def test_wrong_formulas_are_found(monkeypatch):
    """A torch build whose kernels are off by a thousandth, in the advantage or the gradient."""
    check_formulas()
    credit, clip = Grpo.__call__, PpoClip.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Grpo, "__call__", lambda *given: 1.001 * credit(*given))
        with pytest.raises(NumericError, match="advantages of rewards 1, 0, 0, 1"):
            check_formulas()

    def flat(self, live, **how):
        """The right value, with a gradient that is off."""
        found = clip(self, live, **how)
        return dataclasses.replace(found, loss=found.loss + 1e-3 * (live.logp - live.logp.detach()))

    monkeypatch.setattr(PpoClip, "__call__", flat)
    with pytest.raises(NumericError, match="clipped losses and gradients of four cases"):
        check_formulas()
