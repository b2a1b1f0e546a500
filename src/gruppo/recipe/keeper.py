"""Keeps a run: its database, its checkpoints, its dumps. The training loop says when.

A checkpoint folder holds ``model/`` (weights in Hugging Face format with tokenizer, or the
adapter alone for a LoRA run), ``state.safetensors`` (optimizer moments, moved reference, torch's
generator, and trained weights that ``model/`` does not hold under their names) and ``state.json``
(everything else that the next step depends on).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gruppo.evaluate import Evaluation, Graded, in_order
from gruppo.model.packaged import quiet
from gruppo.objective import Coefficients
from gruppo.policy import Policy, checkpoint
from gruppo.policy.checkpoint import read_json, read_tensors, write_json, write_tensors
from gruppo.recipe.recipe import RecordSection
from gruppo.recipe.widen import value_of
from gruppo.record import Database, RunDirectory, StoredSample, dump_step, replay_command
from gruppo.train import TrainState
from gruppo.types import Completion, Group, Problem, Score
from gruppo.update import Targets

MODEL: Final = "model"
_TENSORS: Final = "state.safetensors"
_STATE: Final = "state.json"
RNG: Final = "rng"
_WEIGHT: Final = "model."  # prefix of the policy's own tensors that are trained weights
_ADAMW_MOMENTS: Final = 2  # per trained weight, of its size
_SAMPLES: Final = 20  # greedy completions kept of every evaluation, to show before and after


@dataclass(slots=True)
class RunKeeper:
    """Writes a run into its directory. ``saved`` is the step of the newest checkpoint."""

    directory: RunDirectory
    database: Database
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    settings: RecordSection
    adapter: bool
    saved: int | None = None
    _path: Path | None = field(default=None)

    def step(
        self, step: int, groups: Sequence[Group], advantage: Tensor, metrics: Mapping[str, float]
    ) -> None:
        """Record a finished step, in one transaction."""
        self.database.write_step(step, groups, advantages=advantage, metrics=metrics)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation and some of its completions."""
        shown = evaluation.greedy or evaluation.sampled
        samples = [as_group(graded) for graded in shown[:_SAMPLES]]
        self.database.write_evaluation(step, evaluation.metrics, samples)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step % self.settings.save_every == 0

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of ``state`` and prune older ones; nothing if it is there already."""
        if self.saved == state.step:
            return
        self._path = checkpoint.save(
            self.directory.checkpoints,
            lambda folder: self._write(folder, state),
            step=state.step,
            need=bytes_needed(self.policy, adapter=self.adapter),
        )
        self.saved = state.step
        best = frozenset({state.best_step}) if self.settings.keep_best else frozenset()
        checkpoint.prune(
            self.directory.checkpoints, self.settings.keep_last, keep=best, intact=self._path
        )

    def dump(self, state: TrainState, targets: Targets) -> str:
        """Keep a step whose gradient was not finite; return the command that replays it."""
        step, rollout = state.step + 1, targets.rollout
        tensors = {
            "tokens": rollout.tokens,
            "mask": rollout.mask,
            "engine_logp": rollout.engine_logp,
            "group": rollout.group,
            "length": rollout.length,
            "total": rollout.total,
            "advantage": targets.advantage,
        }
        known = {"old_logp": targets.evidence.old_logp, "ref_logp": targets.evidence.ref_logp}
        tensors |= {name: tensor for name, tensor in known.items() if tensor is not None}
        info = {"prompts": [list(prompt) for prompt in rollout.prompts], "after_step": state.step}
        dump_step(self.directory, step, tensors, info)
        return replay_command(self.directory, step)

    def _write(self, folder: Path, state: TrainState) -> None:
        model = folder / MODEL
        model.mkdir()
        with quiet():
            self.policy.save_pretrained(model, self.tokenizer, adapter_only=self.adapter)
        tensors, scalars = self.policy.state()
        there = {_WEIGHT + name for file in _weight_files(model) for name in tensor_names(file)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in there}
        write_tensors(folder / _TENSORS, {**tensors, RNG: state.rng})
        write_json(folder / _STATE, {"policy": scalars, "train": _state_table(state)})


def bytes_needed(policy: Policy, *, adapter: bool, moves_reference: bool = False) -> int:
    """Bytes of the tensors in a checkpoint, from their sizes; a bound before the first update.

    Args:
        policy: What is to be saved.
        adapter: Whether ``model/`` will hold the adapter alone.
        moves_reference: Whether a reference that is not moved yet will be.
    """
    tensors, scalars = policy.state()
    trained = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(_WEIGHT))
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if not any(name.startswith("optim.") for name in tensors):
        needed += _ADAMW_MOMENTS * trained
    whole = trained if adapter else _size_of(policy.weights())
    if moves_reference and not scalars["reference_updates"]:
        needed += _size_of(dict(policy.model.named_parameters()))
    # trained weights that model/ holds under their names are not written a second time
    return needed + whole - (0 if adapter else min(trained, whole))


def _size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of ``tensors``; memory that several share (tied weights) counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())


def read_evaluation(database: Database, step: int, parts: Sequence[str] = ()) -> Evaluation | None:
    """The recorded evaluation after ``step`` with the completions kept of it; None: there is none.

    Metrics are in the order of a fresh evaluation whose reward has these ``parts``.
    Completions have their text, not their tokens. They are in ``greedy`` if one was kept of each
    problem, else in ``sampled``.
    """
    series = database.evaluations()
    metrics = {name: dict(points)[step] for name, points in series.items() if step in dict(points)}
    if not metrics:
        return None
    metrics = in_order(metrics, parts)
    samples = database.samples(step)
    graded = tuple(
        _graded(list(rows)) for _, rows in groupby(samples, key=lambda s: (s.source, s.problem))
    )
    if all(len(item.completions) == 1 for item in graded):
        return Evaluation(metrics=metrics, greedy=graded)
    return Evaluation(metrics=metrics, sampled=graded)


def _graded(rows: Sequence[StoredSample]) -> Graded:
    first = rows[0]
    return Graded(
        problem=Problem(
            id=first.problem, prompt=first.prompt, answer=first.answer, source=first.source
        ),
        completions=tuple(
            Completion(tokens=(), logp=(), mask=(), version=(), text=row.text, finish=row.finish)
            for row in rows
        ),
        scores=tuple(Score(total=row.total, task=row.task) for row in rows),
    )


def as_group(graded: Graded) -> Group:
    """An evaluation's completions of one problem as a group, for the database."""
    return Group(
        problem=graded.problem,
        prompt_tokens=(),
        completions=graded.completions,
        scores=graded.scores,
    )


def read_checkpoint(folder: Path, policy: Policy, *, reference: bool = True) -> TrainState:
    """Put a checkpoint's tensors into ``policy`` and return the loop's state.

    ``reference = False`` leaves a moved reference out, for a policy that is only to be used.

    Raises:
        ValueError: the checkpoint is of another model.
        OSError: a file is missing or damaged.
    """
    stored = read_json(folder / _STATE)
    assert isinstance(stored, dict), "the manifest vouches for the file"
    tensors = checkpoint_tensors(folder, policy.state()[0])
    rng = tensors.pop(RNG)
    scalars = stored["policy"]
    if not reference:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("reference.")}
        scalars = {**scalars, "reference_updates": 0}
    policy.restore(tensors, scalars)
    return _state_from(stored["train"], rng)


def checkpoint_tensors(folder: Path, live: Container[str]) -> dict[str, Tensor]:
    """A checkpoint's tensors by the policy's names (``live``), and torch's generator."""
    tensors = read_tensors(folder / _TENSORS)
    for file in _weight_files(folder / MODEL):
        found = {_WEIGHT + name: tensor for name, tensor in read_tensors(file).items()}
        tensors |= {name: tensor for name, tensor in found.items() if name in live}
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; no tensor is read."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _state_table(state: TrainState) -> dict[str, Any]:
    """The loop's state as JSON values (its generator is a tensor and stored as one)."""
    table = {entry.name: value_of(state, entry.name) for entry in fields(state)}
    del table["rng"]
    coefficients = state.coefficients
    return {**table, "coefficients": {"kl": coefficients.kl, "entropy": coefficients.entropy}}


def _state_from(table: Mapping[str, Any], rng: Tensor) -> TrainState:
    rest: dict[str, Any] = {**table, "coefficients": Coefficients(**table["coefficients"])}
    return TrainState(rng=rng, **rest)
