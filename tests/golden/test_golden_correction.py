"""Golden engine corrections: ratios, weights, rejections, diagnostics."""

import pytest
import torch

from gruppo.objective import (
    GeometricMask,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenTruncate,
    engine_log_ratio,
    geometric_ratio,
    mismatch,
    sequence_ratio,
)

F64 = torch.float64


def arguments(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    old, engine = (torch.tensor(inputs[key], dtype=F64) for key in ("old_logp", "rollout_logp"))
    return old, engine, torch.tensor(inputs["mask"]).bool()


def assert_matches(actual: torch.Tensor, expected: object, tol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), atol=tol, rtol=0)


def test_ratios(golden) -> None:
    case = golden("is/ratios")
    old, engine, mask = arguments(case["inputs"])
    x = engine_log_ratio(old, engine, mask)
    assert_matches(torch.where(mask, x.exp(), 0), case["expected"]["token"])
    assert_matches(sequence_ratio(x, mask).squeeze(1), case["expected"]["sequence"])
    assert_matches(geometric_ratio(x, mask).squeeze(1), case["expected"]["geometric"])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("is/token_truncate", lambda i: TokenTruncate(max=i["c_max"])),
        ("is/token_mask", lambda i: TokenMask(min=i["c_min"], max=i["c_max"])),
        ("is/icepop", lambda i: TokenMask(min=i["c_min"], max=i["c_max"])),
        ("is/batch_normalize", lambda i: TokenTruncate(max=i["c_max"], batch_normalize=True)),
    ],
)
def test_token_weights(golden, name: str, make) -> None:
    case = golden(name)
    old, engine, mask = arguments(case["inputs"])
    weight, keep = make(case["inputs"])(old, engine, mask)
    assert_matches(weight, case["expected"]["weights"])
    assert torch.equal(keep, weight > 0)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("is/sequence_truncate", lambda i: SequenceTruncate(max=i["c_max"])),
        ("is/sequence_mask", lambda i: SequenceMask(max=i["c_max"])),
    ],
)
def test_sequence_weights(golden, name: str, make) -> None:
    case = golden(name)
    old, engine, mask = arguments(case["inputs"])
    weight, keep = make(case["inputs"])(old, engine, mask)
    spread = torch.tensor(case["expected"]["weights"], dtype=F64)[:, None]
    assert_matches(weight, torch.where(mask, spread, 0).tolist())
    assert torch.equal(keep, mask & (spread > 0))


def test_geometric_mask(golden) -> None:
    case = golden("is/geometric_mask")
    old, engine, mask = arguments(case["inputs"])
    correction = GeometricMask(min=case["inputs"]["c_min"], max=case["inputs"]["c_max"])
    weight, keep = correction(old, engine, mask)
    assert_matches(weight, case["expected"]["token_weights_kept"])
    assert_matches(keep.any(1).double(), case["expected"]["keep"], 0)


def test_veto(golden) -> None:
    case = golden("is/veto")
    old, engine, mask = arguments(case["inputs"])
    veto = case["inputs"]["veto_min"]
    for correction in (TokenTruncate(veto=veto), SequenceMask(max=1e6, veto=veto)):
        weight, keep = correction(old, engine, mask)
        assert_matches(keep.any(1).double(), case["expected"]["keep"], 0)
        assert torch.equal(weight[1], torch.zeros(4, dtype=F64))


def test_diagnostics(golden) -> None:
    case = golden("is/diagnostics")
    found = mismatch(*arguments(case["inputs"]), cap=case["inputs"]["c_max"])
    for name, want in case["expected"].items():
        assert found[name] == pytest.approx(want, abs=case["tol"]), name
    assert found["frac_missing"] == 0.0


def test_length_trap(golden) -> None:
    case = golden("is/length_trap")
    step = torch.tensor(case["inputs"]["per_token_ratio"], dtype=F64).log()
    lengths = case["inputs"]["lengths"]
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    x = engine_log_ratio(step.expand(mask.shape), torch.zeros(mask.shape, dtype=F64), mask)
    assert_matches(sequence_ratio(x, mask).squeeze(1), case["expected"]["sequence_ratio"], 1e-5)
    assert_matches(geometric_ratio(x, mask).squeeze(1), case["expected"]["geometric"])
