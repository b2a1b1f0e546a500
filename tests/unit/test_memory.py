"""Out of memory: smaller portions, the same results, told once."""

import logging
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gruppo import memory
from gruppo.engine import LocalEngine
from gruppo.errors import OutOfMemory
from gruppo.memory import Fitting, is_out_of_memory, release_heap
from gruppo.metric import reduce
from gruppo.model import cast_frozen, load
from gruppo.policy import Policy
from gruppo.settings import UpdateSettings
from gruppo.types import Request, Sampling
from gruppo.update import OptimizerStep, gather_evidence
from support.engines import letters, sharpen
from support.update_steps import named, policy_of, rollout, targets_of, wide_model

FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


def refusing(limit: int, tried: list[int]):
    """Work that runs out of memory with portions above ``limit``."""

    def work(size: int) -> str:
        tried.append(size)
        if size > limit:
            raise RuntimeError(FULL)
        return f"done by {size}"

    return work


def test_portions_are_halved_until_they_fit_and_stay_so(caplog):
    fitting, tried = Fitting("some.setting"), []
    undone: list[int] = []
    with caplog.at_level(logging.WARNING):
        done = fitting.do(refusing(5, tried), 64, total=30, undo=lambda: undone.append(1))
        assert (done, tried, undone) == ("done by 3", [64, 15, 7, 3], [1, 1, 1])
        assert fitting.do(refusing(5, tried), 64, total=30) == "done by 3"
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: going on with some.setting = 15 (was 64)"
    ]


def test_what_never_fits_says_what_to_change():
    with pytest.raises(OutOfMemory, match=r"with some\.setting = 4, and less would not help"):
        Fitting("some.setting").do(refusing(0, []), 9, total=9, least=4)


def resident() -> int:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what was freed")
def test_holes_in_the_heap_are_given_back():
    """128 MiB in small pieces, of which every hundredth stays."""
    pieces = [torch.ones(2**14) for _ in range(2**11)]
    kept = pieces[::100]
    del pieces
    before = resident()
    release_heap()
    assert before - resident() > 100 * 2**20
    assert all(int(piece.sum()) == 2**14 for piece in kept)


def test_other_errors_pass():
    def work(size: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        Fitting("x").do(work, 9, total=9)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


class Narrow:
    """A policy whose forward takes so many rows at once."""

    def __init__(self, policy: Policy, most_rows: int) -> None:
        self.failed = 0
        self._whole = policy._own
        self._most = most_rows

    def __call__(self, prompts, tokens, length, **options):
        if len(prompts) > self._most:
            self.failed += 1
            raise RuntimeError(FULL)
        return self._whole(prompts, tokens, length, **options)


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_the_gradient_is_that_of_a_machine_with_memory(tiny_folder, monkeypatch, fails_in):
    objective, batch = named("default"), rollout()
    settings = UpdateSettings(skip_dead=False)
    gradients = []
    for most in (99, 5):
        policy = policy_of(wide_model(tiny_folder))
        targets = targets_of(policy, objective, batch, settings)
        step = OptimizerStep(policy, objective, targets, objective.coefficients, settings)
        if fails_in == "forward":
            monkeypatch.setattr(policy, "_own", Narrow(policy, most))
        elif most == 5:
            backward, calls = policy.backward, []

            def once(loss, backward=backward, calls=calls):
                backward(loss)
                calls.append(1)
                if len(calls) == 1:  # a part of the gradient is there already
                    raise RuntimeError(FULL)

            monkeypatch.setattr(policy, "backward", once)
        seen = reduce(step.accumulate(torch.arange(12), first=True))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        assert (step.fitting.limit is None) == (most == 99)
        gradients.append(torch.tensor([seen["loss/total"], seen["entropy/mean"]]))
    assert torch.allclose(gradients[0], gradients[2], rtol=0, atol=1e-14)
    assert torch.allclose(gradients[1], gradients[3], rtol=0, atol=1e-12)
    assert float(gradients[0].abs().max()) > 1e-4


def test_no_grad_passes_and_later_steps_know_the_limit(tiny_folder, monkeypatch):
    objective, batch = named("default"), rollout()
    settings = UpdateSettings(inner_epochs=2)
    policy = policy_of(wide_model(tiny_folder))
    whole = gather_evidence(policy, objective, batch, settings).old_logp
    narrow = Narrow(policy, 5)
    monkeypatch.setattr(policy, "_own", narrow)
    fitting = Fitting("train.tokens_per_microbatch")
    cut = gather_evidence(policy, objective, batch, settings, fitting=fitting).old_logp
    assert torch.allclose(cut, whole, rtol=0, atol=1e-13)
    assert fitting.limit is not None
    assert narrow.failed > 0
    narrow.failed = 0
    gather_evidence(policy, objective, batch, settings, fitting=fitting)
    assert narrow.failed == 0


def test_drawing_goes_on_with_fewer_rows(tiny_folder, monkeypatch):
    model = sharpen(AutoModelForCausalLM.from_pretrained(tiny_folder))
    requests = [Request(tokens=(5, 6, 7), num_samples=7, key=(0, 0))]
    sampling = Sampling(max_tokens=9)
    expected = LocalEngine(model, letters, pad_token=256).generate(requests, sampling)
    forward = model.forward

    def small(*args, **kwargs):
        if kwargs["input_ids"].shape[1] == 1 and len(kwargs["input_ids"]) > 2:
            raise RuntimeError(FULL)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    engine = LocalEngine(model, letters, pad_token=256)
    drawn = engine.generate(requests, sampling)
    assert [c.tokens for c in drawn[0]] == [c.tokens for c in expected[0]]
    assert engine._fitting.limit == 1


def test_holes_go_back_whenever_the_process_has_grown_by_so_much(monkeypatch):
    """128 MiB, looked at whenever 8 MiB have passed; what stays after it is the new level."""
    mib = 2**20
    sizes = iter([100, 220, 240, 180, 300, 309, 240])  # at first, and at every look
    looks: list[int] = []
    released: list[int] = []

    def resident() -> int:
        looks.append(next(sizes))
        return looks[-1] * mib

    monkeypatch.setattr(memory, "resident_bytes", resident)
    monkeypatch.setattr(memory, "release_heap", lambda: released.append(looks[-1]))
    watch = memory.HoleWatch()
    for _ in range(16):  # four looks of 8 MiB
        watch.look(2 * mib)
    assert looks == [100, 220, 240, 180, 300, 309, 240]
    assert released == [240, 309]  # above 100 + 128, then above 180 + 128
    watch.look(7 * mib)
    assert len(looks) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_this_process():
    before = memory.resident_bytes()
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * (len(held) // 4096)
    assert 60 * 2**20 < memory.resident_bytes() - before < 70 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_frozen_model_that_was_cast_lets_go_of_its_file(tiny_folder, tmp_path):
    """The file is mapped into memory, and one tensor of it would keep all pages that were read."""
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    model = load(str(folder)).model.requires_grad_(False)
    before = [weight.clone() for weight in model.parameters()]
    file = str(folder / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    cast_frozen(model, torch.bfloat16)
    assert file not in Path("/proc/self/maps").read_text()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.to(new.dtype), new)
