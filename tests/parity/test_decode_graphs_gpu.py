"""The captured decode step on a GPU: what it draws; it waits for the device once a turn."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gruppo.engine.local import LocalEngine, engine
from gruppo.engine.local.capture import CudaCapture
from gruppo.engine.local.schedule import Schedule, rows_of
from gruppo.engine.local.shared import Drawing
from gruppo.model.attention import adopt
from gruppo.types import Request, Sampling
from support.engines import TINY, letters, sharpen

pytestmark = pytest.mark.gpu
SAMPLING = Sampling(max_tokens=10, temperature=0.9)
ASKED = [
    Request(tokens=tuple(range(3, 3 + length)), num_samples=count, key=(0, length))
    for length, count in ((9, 3), (4, 6), (13, 1))
]


def build():
    torch.manual_seed(0)
    model = sharpen(AutoModelForCausalLM.from_config(LlamaConfig(**TINY))).cuda()
    assert adopt(model)
    return model


def assert_same(left, right, error):
    for ours, theirs in zip(left, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.tokens == other.tokens
            assert one.logp == pytest.approx(other.logp, abs=error)


def test_graphs_draw_what_single_steps_draw(monkeypatch):
    model = build()
    ours = LocalEngine(model, letters, pad_token=0)
    monkeypatch.setattr(engine, "capture_for", lambda device: None)
    theirs = LocalEngine(model, letters, pad_token=0)
    for _ in range(2):
        assert_same(ours.generate(ASKED, SAMPLING), theirs.generate(ASKED, SAMPLING), 1e-4)
        assert not ours._replays.is_broken
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.02)


def test_a_turn_waits_once(monkeypatch):
    engine_ = LocalEngine(build(), letters, pad_token=0)
    model, replays = engine_._model, engine_._replays
    schedule = Schedule(rows_of(ASKED, [10] * 3), ASKED, max_rows=10)
    with replays.ready(model, slots=10, width=13, columns=10) as store:
        drawing = Drawing(
            model,
            ASKED,
            schedule,
            sampling=SAMPLING,
            store=store,
            spoken=None,
            replays=replays,
        )
        for _ in range(3):  # prompts, the capture, one replay
            drawing.turn()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                drawing.turn()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in told) == 1


def test_work_that_waits_is_refused():
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    number = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        capture.record(lambda: number.add_(number.item()))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    play = capture.record(lambda: number.mul_(2))
    number.fill_(1)
    play()
    play()
    assert number.item() == 4
