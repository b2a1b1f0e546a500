"""The processed sampling distribution against its golden case."""

import pytest
import torch

from gruppo.engine.sampler import sample
from gruppo.types import Sampling


def test_processed_logp(golden):
    case = golden("sampling/processed_logp")
    given, expected = case["inputs"], case["expected"]
    points = torch.arange(200, dtype=torch.float64) / 200
    logits = torch.tensor([given["logits"]], dtype=torch.float64).expand(len(points), -1)
    temperature = Sampling(max_tokens=1, temperature=given["temperature"])
    filtered = Sampling(max_tokens=1, temperature=given["temperature"], top_p=given["top_p"])
    for sampling, name in (
        (temperature, "logp_temperature_only"),
        (filtered, "logp_after_top_p"),
    ):
        token, logp = sample(logits, points, sampling)
        assert logp[token == given["token"]].tolist() == pytest.approx(
            [expected[name]] * int((token == given["token"]).sum()), abs=case["tol"]
        )
    assert sorted(set(token.tolist())) == expected["kept"]
