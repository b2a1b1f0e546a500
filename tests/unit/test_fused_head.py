"""The fused head: kernels against torch, kept logits against logits made again."""

import pytest
import torch
from torch import Tensor, nn

from gruppo import native
from gruppo.model import fused
from gruppo.model.fused import kept_positions
from gruppo.model.head import token_logp
from gruppo.model.rule import LogitRule

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler here")


def outcome(
    *, rule: LogitRule, bias: bool, entropy: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Values and gradients of a head over 53 tokens at 11 positions, in chunks of 4."""
    torch.manual_seed(0)
    head = nn.Linear(6, 53, bias=bias, dtype=dtype)
    hidden = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    tokens = torch.randint(0, 53, (11,))
    logp, spread = token_logp(head, hidden, tokens, rule=rule, entropy=entropy, chunk=4)
    weights = torch.randn(2, 11, dtype=dtype)
    loss = (weights[0] * logp).sum() + ((weights[1] * spread).sum() if entropy else 0.0)
    return [logp, spread, *torch.autograd.grad(loss, [hidden, *head.parameters()])]


@needs_kernels
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=3.0, temperature=0.7)])
def test_kernels_equal_torch(monkeypatch, rule, bias, entropy):
    compiled = outcome(rule=rule, bias=bias, entropy=entropy)
    monkeypatch.setattr(fused, "can_softmax", lambda logits: False)
    plain = outcome(rule=rule, bias=bias, entropy=entropy)
    for mine, other in zip(compiled, plain, strict=True):
        assert (mine - other).abs().max() < 2e-6 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(LogitRule(softcap=3.0), torch.float32), (LogitRule(), torch.float64)],
    ids=["soft cap", "float64"],
)
def test_torch_does_what_kernels_do_not(monkeypatch, rule, dtype):
    calls: list[str] = []
    monkeypatch.setattr(fused, "pick", lambda *_, **__: calls.append("pick"))
    outcome(rule=rule, bias=False, entropy=True, dtype=dtype)
    assert calls == []


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_kept_logits_give_the_gradient_of_those_made_again(monkeypatch, softcap, compiled):
    """To the bit: with room for none, for one chunk of three, and for all."""
    if not compiled:
        monkeypatch.setattr(fused, "can_softmax", lambda logits: False)
    rule, found = LogitRule(softcap=softcap, temperature=0.9), []
    for room in (0, 5 * 53 * 4, 2**20):
        monkeypatch.setattr(fused, "KEPT_BYTES", room)
        found.append(outcome(rule=rule, bias=True, entropy=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_kept_positions_are_whole_chunks(monkeypatch):
    monkeypatch.setattr(fused, "KEPT_BYTES", 1000)
    assert kept_positions(10, 4, 100) == 10  # all of them fit
    assert kept_positions(11, 4, 100) == 8
    assert kept_positions(11, 4, 300) == 0


def test_a_second_backward_pass_makes_logits_anew():
    """The first one turned the kept ones into their gradient."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 53), torch.randn(11, 6, requires_grad=True)
    tokens = torch.randint(0, 53, (11,))
    logp, _ = token_logp(head, hidden, tokens, rule=LogitRule(), entropy=False, chunk=4)
    wanted = [hidden, head.weight]
    first = torch.autograd.grad(logp.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert float(first[0].abs().max()) > 1e-2


def test_nothing_is_kept_where_no_backward_pass_can_follow():
    head, hidden = nn.Linear(6, 53), torch.randn(11, 6)
    tokens = torch.randint(0, 53, (11,))
    options = {"rule": LogitRule(), "entropy": False, "chunk": 4}
    alone = token_logp(head, hidden, tokens, **options)[0]
    assert sorted(alone.grad_fn.kept) == [0, 4, 8]
    with torch.no_grad():
        assert token_logp(head, hidden, tokens, **options)[0].grad_fn is None
    head.requires_grad_(False)
    assert token_logp(head, hidden, tokens, **options)[0].grad_fn is None
