"""Runs TRL's GRPOTrainer on the work given as JSON on the command line; prints JSON.

It runs with the Python of an environment that has TRL, and imports nothing of gruppo. Questions
are the same, completions have a fixed length, and the phases are timed from outside, by wrapping
the trainer's own methods.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of the phases of every step; a phase within a phase is the outer one's."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._inside = False
        self._began = 0.0

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its seconds added to phase ``name``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                spent = time.perf_counter() - started
                self._now[name] = self._now.get(name, 0.0) + spent

        return wrapped

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start a step's clock."""
        self._now, self._began = {}, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a step's phases."""
        self.steps.append({**self._now, "step": time.perf_counter() - self._began})


def main(work: dict[str, Any]) -> dict[str, Any]:
    """Train for the steps of ``work`` and return medians by phase."""
    import trl  # pyrefly: ignore[missing-import]
    from datasets import Dataset  # pyrefly: ignore[missing-import]

    rows = [
        {"prompt": [{"role": "user", "content": question}], "right": index % 2}
        for index, question in enumerate(work["questions"])
    ]
    total = work["prompts"] * work["group"]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_bench_"),
        use_cpu=work["device"] == "cpu",
        bf16=work["compute"] == "bfloat16",
        model_init_kwargs={"dtype": work["trl_weights"]},
        per_device_train_batch_size=work["trl_micro_batch"],
        gradient_accumulation_steps=total // work["trl_micro_batch"],
        num_generations=work["group"],
        max_completion_length=work["max_tokens"],
        generation_kwargs={"min_new_tokens": work["max_tokens"]},
        temperature=1.0,
        beta=work["beta"],
        learning_rate=1e-6,
        max_steps=work["steps"] + work["warmup"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10_000,
    )

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [
            float(index % work["group"] < work["group"] // 2) for index in range(len(completions))
        ]

    trainer = trl.GRPOTrainer(
        model=work["model"], reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows)
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer._generate_single_turn = clock.timed("sampling", trainer._generate_single_turn)
    scored = trainer._get_per_token_logps_and_entropies
    reference = clock.timed("reference", scored)

    def logps(*args: Any, **kwargs: Any) -> Any:
        return (scored if torch.is_grad_enabled() else reference)(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = logps
    trainer.train()
    used = clock.steps[work["warmup"] :]
    names = sorted({name for step in used for name in step})
    return {
        "seconds": {n: statistics.median(step.get(n, 0.0) for step in used) for n in names},
        "peak_gib": _peak_gib(work["device"]),
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
    }


def _peak_gib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    outcome = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(outcome), encoding="utf-8")
