"""Fixtures of the engine contract: every engine in turn, and a model with sharp logits."""

from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from support.engines import ENGINES, Make, sharpen


@pytest.fixture(params=list(ENGINES))
def make(request: pytest.FixtureRequest) -> Make:
    return ENGINES[request.param]


@pytest.fixture
def model(tiny_folder: Path) -> nn.Module:
    return sharpen(AutoModelForCausalLM.from_pretrained(tiny_folder))
