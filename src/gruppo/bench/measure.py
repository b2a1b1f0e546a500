"""One system's steps, phase by phase: gruppo's own parts, called as the loop calls them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gruppo.bench.machine import peak_gib, wait, watching
from gruppo.bench.work import Work, device_of
from gruppo.engine import LocalEngine
from gruppo.memory import keep_heap, release_heap
from gruppo.model import (
    Activations,
    Encoder,
    Loaded,
    Lora,
    attach,
    compute_dtype,
    end_ids,
    faster_products,
    load,
)
from gruppo.model.packaged import quiet
from gruppo.model.parts import causal, embedding
from gruppo.objective import PRESETS, KLNaive, KLTerm, Objective
from gruppo.policy import Optim, Policy
from gruppo.reward import Number
from gruppo.settings import UpdateSettings
from gruppo.types import Completion, Message, Problem, Request, Rollout, Sampling
from gruppo.update import OptimizerStep, Targets, gather_evidence

_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Medians over the measured steps.

    ``seconds`` by phase: "prefill" (one token for every prompt's first completion), "decode" (all
    other tokens), "sampling" (both), "score" (the last number of every completion, by rule),
    "old" (the pass that steps of several updates need; this step skips it), "reference",
    "forward_backward", "optimizer", "save" (once), "step" (sampling to optimizer).
    ``sampled_per_s`` and ``trained_per_s`` are completion tokens. ``utilisation`` is the share of
    the measured matmul peak that the model's own products reach, by phase. ``padding`` is the share
    of trained positions that are padding, ``kept_tokens`` a step's whose activations were kept.
    ``other_cpus`` above 0.1 means that the timing is worth nothing.
    """

    work: dict[str, Any]
    compute: str
    seconds: dict[str, float]
    sampled_per_s: float
    trained_per_s: float
    utilisation: dict[str, float] = field(default_factory=dict)
    padding: float
    peak_gib: float
    cache_gib: float
    kept_tokens: int
    other_cpus: float


def measure(work: Work, *, gflops: dict[str, float] | None = None) -> Measured:
    """Run ``work`` and time it; ``gflops`` is the machine's peak by type of the products."""
    keep_heap()
    bench = _Bench(work)
    for number in range(work.warmup):
        bench.step(number)
    bench.seconds.clear()
    with watching() as others:
        for number in range(work.steps):
            bench.step(work.warmup + number)
    peak, cache = peak_gib(bench.device), bench.engine.peak_cache_bytes / 2**30
    bench.prefill()
    bench.old()
    bench.save()
    seconds = {name: statistics.median(values) for name, values in bench.seconds.items()}
    seconds["decode"] = max(0.0, seconds["sampling"] - seconds["prefill"])
    phases = ("sampling", "score", "reference", "forward_backward", "optimizer")
    seconds["step"] = sum(seconds.get(phase, 0.0) for phase in phases)
    tokens = work.prompts * work.group * work.max_tokens
    training = seconds["step"] - seconds["sampling"]
    top = (gflops or {}).get(bench.compute)
    return Measured(
        work=asdict(work),
        compute=bench.compute,
        seconds=seconds,
        sampled_per_s=tokens / seconds["sampling"],
        trained_per_s=tokens / training,
        utilisation=bench.utilisation(seconds, top) if top else {},
        padding=0.0 if bench.policy.packed else bench.padding,
        peak_gib=peak,
        cache_gib=cache,
        kept_tokens=bench.kept_tokens,
        other_cpus=others.share,
    )


class _Bench:
    """The parts of a run, and the seconds of its phases."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.device = device_of(work)
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        dtype = compute_dtype(self.device) if work.compute == "auto" else kinds[work.compute]
        self.compute = str(dtype).removeprefix("torch.")
        loaded = load(work.model, device=self.device)
        self.loaded = loaded
        self.objective = _objective(work)
        products = faster_products(self.device, dtype)
        model, reference = loaded.model, "copy"
        if work.lora_rank:
            model = attach(model, Lora(rank=work.lora_rank), compute_dtype=dtype)
            reference = "adapter"
        self.policy = Policy(
            model,
            optim=Optim(),
            total_updates=work.steps + work.warmup,
            compute_dtype=dtype,
            reference=reference if work.beta else "none",
            packing=not work.plain,
            products=products,
            activations=Activations(int(work.max_kept_gib * 2**30)),
        )
        encoder = _encoder(loaded)
        self.engine = LocalEngine(
            model,
            encoder.decode,
            pad_token=encoder.pad_token,
            compute_dtype=dtype,
            max_rows=work.prompts * work.group,
            kind="plain" if work.plain else "shared",
            products=products,
            activations=self.policy.activations,
        )
        total = (work.steps + work.warmup) * work.prompts
        self.prompts = _prompts(work, loaded, encoder, total)
        self.seconds: dict[str, list[float]] = {}
        self.padding = 0.0
        self.kept_tokens = 0
        self.batch: Rollout | None = None

    def step(self, number: int) -> None:
        work, first = self.work, number * self.work.prompts
        prompts = self.prompts[first : first + work.prompts]
        settings = UpdateSettings(
            tokens_per_microbatch=work.tokens_per_microbatch, skip_dead=work.dead > 0
        )
        self.policy.activations.open()
        with self._phase("sampling"):
            groups = self._draw(prompts, work.max_tokens, first, work.group)
            release_heap()
        self.kept_tokens = self.policy.activations.num_tokens
        with self._phase("score"):
            _score(groups)
        batch = self.batch = _rollout(prompts, groups, dead=work.dead)
        if work.beta:
            with self._phase("reference"):
                evidence = gather_evidence(self.policy, self.objective, batch, settings)
        else:
            evidence = gather_evidence(self.policy, self.objective, batch, settings)
        advantage = self.objective.credit(batch, evidence)
        targets = Targets(rollout=batch, evidence=evidence, advantage=advantage)
        with self._phase("forward_backward"):
            step = OptimizerStep(
                self.policy, self.objective, targets, self.objective.coefficients, settings
            )
            step.accumulate(torch.arange(len(batch.group)), first=True)
        with self._phase("optimizer"):
            self.policy.step()
        self.engine.load(None, self.policy.version)
        longest = max(map(len, prompts)) + work.max_tokens
        filled = sum(len(prompt) + work.max_tokens for prompt in prompts) * work.group
        self.padding = 1 - filled / (longest * len(batch.group))

    def prefill(self) -> None:
        """Time the prompts alone: one completion of one token each."""
        for _ in range(3):
            with self._phase("prefill"):
                self._draw(self.prompts[: self.work.prompts], 1, 0, 1)

    def old(self) -> None:
        """Time the policy's own pass over the last batch, as two updates of it would need."""
        assert self.batch is not None, "after a step"
        budget = self.work.tokens_per_microbatch
        settings = UpdateSettings(tokens_per_microbatch=budget, minibatches=2)
        alone = _objective(replace(self.work, beta=0.0))
        with self._phase("old"):
            gather_evidence(self.policy, alone, self.batch, settings)

    def save(self) -> None:
        """Time writing the weights as a model folder."""
        with tempfile.TemporaryDirectory() as folder, quiet(), self._phase("save"):
            self.policy.save_pretrained(Path(folder), self.loaded.tokenizer)

    def utilisation(self, seconds: dict[str, float], top: float) -> dict[str, float]:
        """Share of ``top`` GFLOP/s that the model's own products reach.

        Twice its weights a token and pass; a backward pass is two, or one where they are frozen.
        The embedding's look-up counts nothing, the head where it is applied: at completion tokens.
        """
        work = self.work
        size = embedding(self.loaded.model).numel()
        every = sum(p.numel() for p in causal(self.loaded.model).parameters())
        tied = causal(self.loaded.model).config.tie_word_embeddings
        trunk = every - (size if tied else 2 * size)
        completions = work.prompts * work.group * work.max_tokens
        prompts = sum(map(len, self.prompts[: work.prompts]))
        forward = 2 * (trunk * (completions + prompts) + size * completions) / 1e9
        made = dict.fromkeys(("sampling", "old", "reference"), forward)
        made["forward_backward"] = (2 if work.lora_rank else 3) * forward
        made["forward_backward"] -= 2 * trunk * self.kept_tokens / 1e9  # sampling has made them
        return {name: made[name] / seconds[name] / top for name in made if name in seconds}

    def _draw(
        self, prompts: list[tuple[int, ...]], tokens: int, key: int, samples: int
    ) -> list[tuple[Completion, ...]]:
        requests = [
            Request(tokens=prompt, num_samples=samples, key=(_SEED, key + index))
            for index, prompt in enumerate(prompts)
        ]
        return self.engine.generate(requests, Sampling(max_tokens=tokens))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        wait(self.device)
        started = time.perf_counter()
        yield
        wait(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)


def _objective(work: Work) -> Objective:
    kl = KLTerm(beta=work.beta, estimator=KLNaive()) if work.beta else None
    preset = PRESETS["default"].objective
    return Objective(
        credit=preset.credit, surrogate=preset.surrogate, weights=preset.weights, kl=kl
    )


def _encoder(loaded: Loaded) -> Encoder:
    chat = loaded.tokenizer.chat_template is not None
    ends = end_ids(loaded.model.generation_config)
    return Encoder(loaded.tokenizer, chat=chat, stop_tokens=ends)


def _prompts(work: Work, loaded: Loaded, encoder: Encoder, count: int) -> list[tuple[int, ...]]:
    if work.prompt_tokens:
        draw = torch.Generator().manual_seed(_SEED)
        high = len(embedding(loaded.model))
        shape = (count, work.prompt_tokens)
        return [tuple(row) for row in torch.randint(high // 2, shape, generator=draw).tolist()]
    asked = work.questions(count)
    return [encoder.encode((Message(role="user", content=text),)) for text in asked]


def _score(groups: list[tuple[Completion, ...]]) -> None:
    """Grade all, as a rule does."""
    reward, problem = Number(), Problem(id="bench", prompt=(), answer="1")
    for group in groups:
        reward(problem, group)


def _rollout(
    prompts: list[tuple[int, ...]], groups: list[tuple[Completion, ...]], *, dead: int
) -> Rollout:
    """The batch with made-up rewards: half of each group right, of the first ``dead`` ones all."""
    rows = [completion for group in groups for completion in group]
    tokens = torch.tensor([row.tokens for row in rows])
    size = len(groups[0])
    place = torch.arange(len(rows))
    total = ((place % size < size // 2) | (place < dead * size)).double()
    return Rollout(
        prompts=tuple(prompts),
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        engine_logp=torch.tensor([row.logp for row in rows]),
        group=torch.arange(len(groups)).repeat_interleave(size),
        total=total,
        task=total,
        parts=total[:, None],
        part_names=("made_up",),
        part_weights=torch.ones(1, dtype=torch.float64),
        length=torch.full((len(rows),), tokens.shape[1]),
        truncated=torch.ones(len(rows), dtype=torch.bool),
        steps=((),) * len(rows),
        baseline=None,
    )
