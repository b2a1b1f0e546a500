"""Rewards by a model that was trained to give them: a sequence classifier's logit.

It runs in the trainer, beside the policy, without gradients. Its tokens are its own, so a
completion's text is tokenised anew, in the model's chat template; control tokens that are spelled
out in the text are broken up first. A reward model's logit can be raised without the answers
getting better: clip it (``clip`` of the part), and watch held-out problems that need no model.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from gruppo.reward.base import GroupRows, Value, refused, ungraded
from gruppo.reward.extract import after_thinking
from gruppo.types import Completion, Problem

if TYPE_CHECKING:
    from gruppo.model.classifier import Classifier

_USUAL_CONTEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """``scale`` * logit + ``offset`` of a sequence classifier from Hugging Face, in float32.

    ``name`` is a hub name or a folder (safetensors, no code of its own), ``revision`` a branch, tag
    or commit. ``label`` says which logit, where the model has several. It is computed on
    ``device`` (None in a recipe: the policy's) with weights in ``dtype``, in batches of at most
    ``tokens_per_batch`` tokens, padding counted. ``where = "answer"`` shows it what follows
    ``</think>`` (arXiv 2501.12948 judges helpfulness so), "all" the whole text. A text of more
    tokens than ``max_length`` (None: the model's context, at most 4096) scores the part's minimum.

    Raises:
        ValueError: an empty name or a number out of its range.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["reward_model"] = "reward_model"
    name: str
    revision: str | None = None
    label: int | None = None
    scale: float = 1.0
    offset: float = 0.0
    where: Literal["answer", "all"] = "answer"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokens_per_batch: int = 8192
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("reward_model.model is empty: give a hub name or a folder")
        if self.scale == 0 or not (math.isfinite(self.scale) and math.isfinite(self.offset)):
            raise ValueError(
                f"reward_model.scale = {self.scale}, offset = {self.offset}: both must be finite, "
                "and scale not 0"
            )
        for key, value in (
            ("tokens_per_batch", self.tokens_per_batch),
            ("max_length", self.max_length),
        ):
            if value is not None and value < 1:
                raise ValueError(f"reward_model.{key} = {value}: must be at least 1")
        if self.label is not None and self.label < 0:
            raise ValueError(f"reward_model.label = {self.label}: labels count from 0")

    def open(self) -> None:
        """Load the model.

        Raises:
            ValueError: it cannot be used as meant.
            OSError: download or disk failed.
        """
        _opened(self)

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[Value]:
        """Grade one group."""
        return self.score_batch([(problem, completions)])[0]

    def score_batch(self, groups: Sequence[GroupRows]) -> list[list[Value]]:
        """Grade all groups, rows of similar length together."""
        classifier = _opened(self)
        limit = self.max_length or min(classifier.context or _USUAL_CONTEXT, _USUAL_CONTEXT)
        values: dict[tuple[int, int], Value] = {}
        tokens: dict[tuple[int, int], Sequence[int]] = {}
        for g, (problem, completions) in enumerate(groups):
            for i, completion in enumerate(completions):
                text = self._text(completion)
                ids = tokenise(classifier, problem, text) if text.strip() else ()
                if not ids:
                    values[g, i] = refused("no_answer", "nothing follows the thinking")
                elif len(ids) > limit:
                    about = f"{len(ids)} tokens, more than {limit}"
                    values[g, i] = refused("oversize", about)
                else:
                    tokens[g, i] = ids
        for places in batches({p: len(ids) for p, ids in tokens.items()}, self.tokens_per_batch):
            found = self._compute(classifier, [tokens[place] for place in places])
            values |= dict(zip(places, found, strict=True))
        return [[values[g, i] for i in range(len(rows))] for g, (_, rows) in enumerate(groups)]

    def close(self) -> None:
        """Free the model; the next call loads it again."""
        with _LOCK:
            _OPEN.pop(self, None)

    def _text(self, completion: Completion) -> str:
        return completion.text if self.where == "all" else after_thinking(completion.text)

    def _compute(self, classifier: Classifier, rows: Sequence[Sequence[int]]) -> list[Value]:
        """One batch; if it fails (memory, say), its rows are unscored and the others are not."""
        from gruppo.model.classifier import logits

        try:
            found = logits(classifier, rows)[:, self.label or 0].tolist()
        except (RuntimeError, IndexError) as error:
            text = f"{self.name}: {type(error).__name__}: {error}"
            return [ungraded("reward_model", text)] * len(rows)
        return [self.scale * logit + self.offset for logit in found]


_OPEN: dict[RewardModel, Classifier] = {}
_LOCK = threading.Lock()


def _opened(reward: RewardModel) -> Classifier:
    """The loaded model of a reward; equal records share it."""
    with _LOCK:
        if reward not in _OPEN:
            _OPEN[reward] = _load(reward)
        return _OPEN[reward]


def _load(reward: RewardModel) -> Classifier:
    # transformers takes seconds to import: not for rewards that need none
    import torch

    from gruppo.model.classifier import load_classifier

    classifier = load_classifier(
        reward.name,
        dtype=torch.bfloat16 if reward.dtype == "bfloat16" else torch.float32,
        device=reward.device or "cpu",
        revision=reward.revision,
    )
    if reward.label is None and classifier.num_labels != 1:
        raise ValueError(
            f"reward model {reward.name} has {classifier.num_labels} labels: set label to the "
            "number of the one whose logit is the reward"
        )
    if reward.label is not None and reward.label >= classifier.num_labels:
        raise ValueError(
            f"reward_model.label = {reward.label}: {reward.name} has {classifier.num_labels} "
            "labels, counted from 0"
        )
    return classifier


def tokenise(classifier: Classifier, problem: Problem, text: str) -> list[int]:
    """Token ids of the problem's messages and the answer ``text``, as the model was trained.

    In its chat template; without one (encoders), prompt and answer as a pair of texts.
    """
    tokenizer = classifier.tokenizer
    added = map(str, tokenizer.added_tokens_decoder.values())
    text = broken_up(text, {*tokenizer.all_special_tokens, *added})
    if tokenizer.chat_template is None:
        prompt = "\n".join(message.content for message in problem.prompt)
        return list(tokenizer(prompt, text)["input_ids"])
    messages = [{"role": m.role, "content": m.content} for m in problem.prompt]
    messages.append({"role": "assistant", "content": text})
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    return list(cast("Mapping[str, list[int]]", encoded)["input_ids"])


def broken_up(text: str, tokens: Collection[str]) -> str:
    """``text`` with a space after the first character of every token that is spelled out in it.

    Repeated until none is left, since one may stand in another. Runs of white space and lone
    characters, which some tokenizers add, control nothing and stay.

    >>> broken_up("a<|end|>b <|end<|end|>|>", ["<|end|>", "end|>", "  "])
    'a< |e nd|>b <|end< |e nd|>|>'
    """
    known = {word for token in tokens if len(word := token.strip()) > 1}
    if not known:
        return text
    pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
    while (broken := pattern.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)) != text:
        text = broken
    return text


def batches(lengths: dict[tuple[int, int], int], budget: int) -> Iterator[list[tuple[int, int]]]:
    """Places in batches of at most ``budget`` tokens with padding (or one row), by length.

    >>> list(batches({(0, 0): 4, (0, 1): 9, (0, 2): 3, (0, 3): 4}, 8))
    [[(0, 2), (0, 0)], [(0, 3)], [(0, 1)]]
    """
    batch: list[tuple[int, int]] = []
    for place in sorted(lengths, key=lambda place: (lengths[place], place)):
        if batch and lengths[place] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
