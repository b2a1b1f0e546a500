"""What engines share: checking what they are asked, and turning drawn tokens into completions.

No engine is built on this by inheritance; these are plain functions. Nothing here draws a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gruppo.types import Completion, Engine, Finish, Problem, Request, Sampling

Decode = Callable[[Sequence[int]], str]
EngineKind = Literal["shared", "plain"]
"""How the local engine draws: prompts shared and batches refilled, or in plain waves."""


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The sampler of completions that are one turn: what the engine draws is the whole."""

    engine: Engine

    def draw(
        self, problems: Sequence[Problem], requests: Sequence[Request], sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Draw from the requests; the problems are not looked at."""
        return self.engine.generate(requests, sampling)


def check_sampling(sampling: Sampling, *, prefix: str = "sampling.") -> None:
    """Raise ValueError if a field of ``sampling`` cannot be honoured.

    ``prefix`` stands before a field's name in the error.

    >>> check_sampling(Sampling(max_tokens=8, top_p=0.0))
    Traceback (most recent call last):
    ValueError: sampling.top_p = 0.0 keeps no token; use a number in (0, 1], 1 for off
    """
    if sampling.max_tokens < 0:
        raise ValueError(f"{prefix}max_tokens = {sampling.max_tokens}; use 0 or more")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(
            f"{prefix}temperature = {sampling.temperature}; use 0 (greedy) or a positive number"
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"{prefix}top_p = {sampling.top_p} keeps no token; use a number in (0, 1], 1 for off"
        )
    if sampling.top_k < 0:
        raise ValueError(f"{prefix}top_k = {sampling.top_k}; use 0 for off, or 1 and more")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"{prefix}min_p = {sampling.min_p}; use a number in [0, 1], 0 for off")
    if "" in sampling.stop:
        raise ValueError(f"{prefix}stop holds an empty string, which ends every text; remove it")


def check_requests(
    requests: Sequence[Request], *, vocab_size: int | None = None, context: int | None = None
) -> None:
    """Raise ValueError naming the request (by its index) that cannot be served.

    Args:
        requests: what was asked.
        vocab_size: number of the model's token ids; None if not known.
        context: most tokens the model can read, prompt and completion together; None if open.
    """
    for index, request in enumerate(requests):
        name = f"request {index} (key {request.key})"
        if not request.tokens:
            raise ValueError(f"{name} has an empty prompt; give it at least one token, say the BOS")
        if request.num_samples < 1:
            raise ValueError(f"{name}: num_samples = {request.num_samples}; use 1 or more")
        if request.offset < 0:
            raise ValueError(f"{name}: offset = {request.offset}; use 0 or more")
        if request.max_tokens is not None and request.max_tokens < 0:
            raise ValueError(f"{name}: max_tokens = {request.max_tokens}; use 0 or more")
        low, high = min(request.tokens), max(request.tokens)
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise ValueError(
                f"{name} has token id {low if low < 0 else high}, but the model knows ids 0 to "
                f"{'...' if vocab_size is None else vocab_size - 1}; use the model's own tokenizer"
            )
        if context is not None and len(request.tokens) > context:
            raise ValueError(
                f"{name} has a prompt of {len(request.tokens)} tokens, but the model reads at most "
                f"{context}; drop or shorten it"
            )


def room(request: Request, sampling: Sampling, context: int | None) -> int:
    """Number of tokens that may be drawn: the budget, or less where the context ends.

    >>> room(Request(tokens=(1, 2, 3), num_samples=1, key=(0,)), Sampling(max_tokens=8), 10)
    7
    """
    own = sampling.max_tokens if request.max_tokens is None else request.max_tokens
    budget = min(sampling.max_tokens, own)
    return budget if context is None else min(budget, context - len(request.tokens))


def cut(text: str, stop: Sequence[str]) -> str:
    r"""``text`` up to the earliest stop string in it.

    >>> cut("4</answer> and so on", ("</answer>", "\n"))
    '4'
    """
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    return text[: min(found)] if found else text


def ends_in_stop(tokens: Sequence[int], *, stop: Sequence[str], decode: Decode) -> bool:
    """True if the text of ``tokens`` holds a stop string that its last token completed.

    The end of the text is looked at first: a stop string of n bytes spans at most n tokens with
    text (a token has at least a byte; some more are taken for those that have none). Only if it is
    found there, which is rare, the whole text is decoded, because a text may differ at the cut.
    """
    window = max(len(string.encode()) for string in stop) + 8
    tail = decode(tokens[-window:])
    if not any(string in tail for string in stop):
        return False
    text = tail if len(tokens) <= window else decode(tokens)
    return any(string in text for string in stop)


def complete(
    tokens: Sequence[int],
    logp: Sequence[float],
    *,
    stopped: bool,
    sampling: Sampling,
    version: int,
    decode: Decode,
) -> Completion:
    """Make the Completion of a row that has ended.

    Args:
        tokens: token ids as drawn, an ending stop token included.
        logp: natural-log probability of each.
        stopped: True if a stop token or stop string ended it, False if the budget did.
        sampling: what it was drawn with; says which end token is not text, and where text is cut.
        version: version of the policy that drew it.
        decode: token ids to text.
    """
    assert len(tokens) == len(logp), "one log-probability a token"
    spoken = tokens[:-1] if stopped and tokens[-1] in sampling.stop_tokens else tokens
    text = cut(decode(spoken), sampling.stop) if spoken else ""
    finish: Finish = "stop" if stopped else "length"
    return Completion(
        tokens=tuple(tokens),
        logp=tuple(logp),
        mask=(True,) * len(tokens),
        version=(version,) * len(tokens),
        text=text,
        finish=finish,
    )
