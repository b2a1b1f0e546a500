"""The keyed uniforms and the inverse-CDF sampler, alone."""

import math

import numpy as np
import pytest
import torch

from gruppo.engine.sampler import draw_plainly, keyed_uniform, pick, sample, stream, uniforms
from gruppo.types import Sampling

PLAIN = Sampling(max_tokens=1)
FROZEN = {
    ((0, 0, 0), 0, 0): 0.8908076552960262,
    ((0, 1, 2), 3, 4): 0.741052036262617,
    ((42, 100, 7), 15, 2047): 0.9408325885682254,
    ((-1,), 0, 1): 0.14584767734514692,
    ((2**63, 5), 1, 0): 0.17341877976647369,
}


def draws(probs: list[float], points: list[float], sampling: Sampling = PLAIN) -> tuple[list, list]:
    logits = torch.tensor(probs, dtype=torch.float64).log().expand(len(points), -1)
    token, logp = sample(logits, torch.tensor(points, dtype=torch.float64), sampling)
    return token.tolist(), logp.tolist()


def splitmix(x: int) -> int:
    """The published finaliser in numpy's unsigned arithmetic."""
    with np.errstate(over="ignore"):
        z = np.uint64(x)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


@pytest.mark.parametrize("key", [(), (0,), (7, 3, 1), (-1, 2**63, 2**64 - 1)])
@pytest.mark.parametrize(("index", "position"), [(0, 0), (5, 0), (2, 4095)])
def test_uniform_is_the_documented_hash(key, index, position):
    gamma, word = 0x9E3779B97F4A7C15, 2**64 - 1
    state = splitmix((len(key) + gamma) & word)
    for part in (*key, index):
        state = splitmix((state + gamma + part) & word)
    mixed = splitmix(state ^ splitmix((position + gamma) & word))
    assert keyed_uniform(key, index, position) == (mixed >> 12) * 2.0**-52


def test_uniform_never_changes_silently():
    """A change of these values changes every run that was ever seeded."""
    values = [keyed_uniform(*at) for at in FROZEN]
    assert values == list(FROZEN.values())


def test_uniforms_are_vectorised_over_rows_and_positions():
    keys = [((1, 2, n), n % 3, 10 * n) for n in range(50)]
    rows = torch.tensor([stream(key, index) for key, index, _ in keys])
    at = torch.tensor([position for _, _, position in keys])
    assert uniforms(rows, at).tolist() == [keyed_uniform(*each) for each in keys]


@pytest.mark.parametrize("axis", ["position", "sample", "step", "draw"])
def test_uniforms_are_uniform_along_every_axis(axis):
    """Chi-square over 64 bins of 12,800 numbers, and of pairs of neighbours over 8 x 8 cells."""
    count = torch.arange(12_800)
    if axis == "position":
        values = uniforms(torch.full_like(count, stream((0, 1, 2), 3)), count)
    else:
        rows = {
            "sample": lambda n: stream((0, 1, 2), n),
            "step": lambda n: stream((0, n, 2), 3),
            "draw": lambda n: stream((0, 1, n), 3),
        }[axis]
        values = uniforms(torch.tensor([rows(n) for n in range(12_800)]), torch.zeros_like(count))
    assert values.dtype == torch.float64
    assert 0 <= float(values.min()) < float(values.max()) < 1
    single = torch.bincount((values * 64).long(), minlength=64)
    cells = (values[:-1] * 8).long() * 8 + (values[1:] * 8).long()
    for counts in (single, torch.bincount(cells, minlength=64)):
        expected = counts.sum() / 64
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 103.4  # 99.9 % quantile with 63 degrees of freedom


def test_no_two_of_many_rows_share_a_number():
    rows = torch.tensor(
        [stream((0, s, p), g) for s in range(10) for p in range(32) for g in range(8)]
    )
    grid = uniforms(rows.repeat_interleave(64), torch.arange(64).repeat(len(rows)))
    assert len(grid.unique()) == len(rows) * 64


def test_key_length_matters():
    assert len({stream((1,), 0), stream((1, 0), 0), stream((1, 0, 0), 0), stream((), 1)}) == 4


def test_inverse_cdf_hand_values():
    """Cumulative 0.5, 0.75, 1: each token owns its half-open interval."""
    token, logp = draws([0.5, 0.25, 0.25], [0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2.0**-52])
    assert token == [0, 0, 1, 1, 2, 2]
    assert logp == pytest.approx([math.log(p) for p in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)])


def test_tokens_without_mass_are_never_drawn():
    points = [0.0, 1e-17, 0.3, 0.999999, 1 - 2.0**-52]
    token, logp = draws([0.0, 0.0, 1.0] + [0.0] * 300, points)
    assert token == [2] * 5
    assert logp == [0.0] * 5
    # the mass on both sides of a block's edge, none behind it
    edge = [0.0] * 127 + [0.5, 0.5] + [0.0] * 127
    assert draws(edge, [0.0, 0.49, 0.51, 1 - 2.0**-52])[0] == [127, 127, 128, 128]


def test_rounding_at_the_end_finds_a_token_with_mass():
    """The largest uniform, where block sums in float32 and inner sums in float64 disagree."""
    torch.manual_seed(0)
    logits = torch.randn(200, 300)
    logits[:, 90:128] = -math.inf
    logits[:, 140:] = -math.inf
    logits[100:, 128:] = -math.inf
    u = torch.full((200,), 1 - 2.0**-52, dtype=torch.float64)
    token, logp = sample(logits, u, PLAIN)
    assert token[:100].tolist() == [139] * 100
    assert token[100:].tolist() == [89] * 100
    exact = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert logp.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


def test_temperature_divides_the_logits():
    """p = 0.8, 0.2 at temperature 0.5 is 0.64, 0.04 renormalised."""
    token, logp = draws([0.8, 0.2], [0.9411, 0.9413], Sampling(max_tokens=1, temperature=0.5))
    assert token == [0, 1]
    assert logp == pytest.approx([math.log(16 / 17), math.log(1 / 17)], abs=1e-6)


def test_greedy_is_a_point_mass():
    token, logp = draws([0.2, 0.4, 0.4], [0.1, 0.9], Sampling(max_tokens=1, temperature=0.0))
    assert token == [1, 1]
    assert logp == [0.0, 0.0]


FILTERED = [
    (Sampling(max_tokens=1, top_k=2), [0, 1]),
    (Sampling(max_tokens=1, top_k=9), [0, 1, 2, 3]),
    (Sampling(max_tokens=1, top_p=0.39), [0]),
    (Sampling(max_tokens=1, top_p=0.41), [0, 1]),
    (Sampling(max_tokens=1, top_p=0.99), [0, 1, 2, 3]),
    (Sampling(max_tokens=1, min_p=0.6), [0, 1]),
    (Sampling(max_tokens=1, min_p=1.0), [0]),
    # of top-3 (mass 0.9) the first two hold 7/9 > 0.75: top-p acts on what top-k left
    (Sampling(max_tokens=1, top_k=3, top_p=0.75), [0, 1]),
    (Sampling(max_tokens=1, top_k=3, top_p=0.8, min_p=0.4), [0, 1, 2]),
    (Sampling(max_tokens=1, top_k=3, top_p=0.8, min_p=0.51), [0, 1]),
]


@pytest.mark.parametrize(("sampling", "kept"), FILTERED)
def test_filters_keep_and_renormalise(sampling, kept):
    probs = [0.4, 0.3, 0.2, 0.1]
    token, logp = draws(probs, [(n + 0.5) / 1000 for n in range(1000)], sampling)
    mass = sum(probs[k] for k in kept)
    assert sorted(set(token)) == kept
    for one, value in zip(token, logp, strict=True):
        assert value == pytest.approx(math.log(probs[one] / mass), abs=1e-6)
    for k in kept:
        assert token.count(k) / 1000 == pytest.approx(probs[k] / mass, abs=0.002)


def test_ties_with_the_last_kept_are_kept():
    for sampling in (Sampling(max_tokens=1, top_k=2), Sampling(max_tokens=1, top_p=0.6)):
        token, logp = draws([0.4, 0.2, 0.2, 0.2], [0.1, 0.5, 0.7, 0.9], sampling)
        assert token == [0, 1, 2, 3]
        assert logp == pytest.approx([math.log(p) for p in (0.4, 0.2, 0.2, 0.2)], abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
def test_nucleus_of_a_large_vocabulary_equals_a_full_sort(scale):
    """Flat rows need more candidates than are looked at first; peaked rows do not."""
    torch.manual_seed(0)
    logits = torch.randn(4, 2000) * scale
    probs = logits.double().softmax(-1)
    u = torch.rand(4, dtype=torch.float64)
    token, logp = sample(logits, u, Sampling(max_tokens=1, top_p=0.9))
    for row in range(4):
        ranked, ids = probs[row].sort(descending=True, stable=True)
        size = int((ranked.cumsum(0) < 0.9).sum()) + 1
        kept = ids[:size] if scale else ids
        assert int(token[row]) in kept.tolist()
        expected = math.log(float(probs[row, token[row]] / probs[row, kept].sum()))
        assert float(logp[row]) == pytest.approx(expected, abs=2e-5)


def test_large_vocabulary_matches_a_float64_cdf():
    """1,000 points over 50,021 tokens (no multiple of the block) against numpy."""
    torch.manual_seed(1)
    logits = torch.randn(1, 50_021) * 2
    probs = logits[0].double().softmax(-1).numpy()
    points = (np.arange(1000) + 0.5) / 1000
    expected = np.searchsorted(np.cumsum(probs), points, side="right")
    token, logp = sample(logits.expand(1000, -1), torch.from_numpy(points), PLAIN)
    assert np.mean(token.numpy() == expected) > 0.99  # float32 rounding at interval ends
    assert np.abs(np.cumsum(probs)[token.numpy()] - points).max() < probs.max() + 1e-5
    assert np.abs(logp.numpy() - np.log(probs[token.numpy()])).max() < 1e-5


def test_half_precision_logits_are_widened_first():
    logits = torch.tensor([[3.0, 1.0, 0.5]], dtype=torch.bfloat16)
    u = torch.tensor([0.95], dtype=torch.float64)
    token, logp = sample(logits, u, Sampling(max_tokens=1, temperature=0.7))
    exact = (logits.double() / 0.7).log_softmax(-1)[0, token]
    assert float(logp) == pytest.approx(float(exact), abs=1e-6)
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad, temperature):
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    u = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="logits hold NaN or inf"):
        sample(logits, u, Sampling(max_tokens=1, temperature=temperature))


def test_excluded_tokens_are_not_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
    token, logp = sample(logits, torch.tensor([0.0], dtype=torch.float64), PLAIN)
    assert (token.tolist(), logp.tolist()) == ([1], [0.0])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_refused_whatever_the_filter(options, bad):
    """A row of NaN passes no filter: nothing of it is left, which is no distribution either."""
    logits = torch.zeros(3, 300)
    logits[1, 7] = bad
    with pytest.raises(FloatingPointError, match="logits hold NaN or inf"):
        sample(
            logits, torch.full((3,), 0.5, dtype=torch.float64), Sampling(max_tokens=1, **options)
        )


def test_a_nucleus_beyond_the_candidates_is_told_and_drawn_exactly():
    logits = torch.zeros(2, 2000)
    logits[1, 3] = 30.0  # one row whose nucleus is small, one that needs 1,000 tokens
    point = torch.tensor([0.999, 0.5], dtype=torch.float64)
    half = Sampling(max_tokens=1, top_p=0.5)
    quick = pick(logits, point, half)
    assert not bool(quick.is_exact)
    assert bool(pick(logits[1:], point[1:], half).is_exact)
    exact = pick(logits, point, half, is_exact=True)
    assert bool(exact.is_exact)
    token, _, told = draw_plainly(logits, point, half)
    assert told.token == exact.token.tolist() == token.tolist()
    assert told.logp == exact.logp.tolist()
