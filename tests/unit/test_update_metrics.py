"""Per-token numbers of an optimizer step, by hand."""

import math

import pytest
import torch

from gruppo.metric import reduce
from gruppo.objective import (
    Coefficients,
    Grpo,
    Live,
    Objective,
    PpoClip,
    SeqMeanTokenMean,
    Totals,
    compute_loss,
    make_rows,
)
from gruppo.update import (
    token_metrics,
)


def test_token_metrics_are_means_over_the_trained_tokens():
    """Two rows; ratios 1.5, 0.5 | 1.0; clip range 0.8 ... 1.28; advantage +1 and -1."""
    mask = torch.tensor([[True, True], [True, False]])
    group = torch.zeros(2, dtype=torch.long)
    objective = Objective(credit=Grpo(), surrogate=PpoClip(), weights=SeqMeanTokenMean())
    old = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]], dtype=torch.float64)
    ratio = torch.tensor([[1.5, 0.5], [1.0, 7.0]], dtype=torch.float64)
    rows = make_rows(
        objective,
        advantage=torch.tensor([1.0, -1.0], dtype=torch.float64),
        mask=mask,
        group=group,
        scored=torch.tensor([True, True]),
        old_logp=old,
        engine_logp=old,
        ref_logp=old - 0.5,
        totals=Totals.of(mask, group),
        selected=None,
    )
    live = Live(logp=torch.nan_to_num(old + ratio.log()), entropy=None, mask=mask)
    loss = compute_loss(objective, live, rows, Coefficients())
    seen = reduce(token_metrics(loss, rows, first=True))
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.0)]
    gaps = [-0.5 - math.log(r) for r in (1.5, 0.5, 1.0)]  # ref - live
    expected = {
        "loss/total": -(1.28 + 0.5) / 4 + 1 / 2,
        "loss/policy": -(1.28 + 0.5) / 4 + 1 / 2,
        "ratio/mean": 1.0,
        "ratio/min": 0.5,
        "ratio/max": 1.5,
        "ratio/first_minibatch_maxdev": 0.5,
        "clip/low": 0.0,  # only counted where it acts: 0.5 with A > 0 is not cut
        "clip/high": 1 / 3,
        "policy/kl_old_k3": sum(k3) / 3,
        "kl/ref_k3": sum(math.exp(g) - 1 - g for g in gaps) / 3,
    }
    assert seen == pytest.approx(expected, abs=1e-12)
    assert "ratio/first_minibatch_maxdev" not in token_metrics(loss, rows, first=False)
