"""How much memory a recipe needs, before it is run: every part counted, the peak their worst sum.

Counted from the model's configuration and the recipe's numbers; nothing is loaded or computed.
Work that depends on the data, such as how long prompts are, is taken at its bound unless told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gruppo import dist
from gruppo.engine.local.batch import plan_waves
from gruppo.engine.local.cache import plain_columns
from gruppo.engine.local.schedule import Schedule, rows_of
from gruppo.memory import resident_bytes
from gruppo.model import Products, can_choose
from gruppo.model.classifier import classifier_bytes
from gruppo.model.footprint import Footprint, Shape, footprint
from gruppo.model.fused import kept_positions
from gruppo.native import kernels
from gruppo.policy.optim import SLICE
from gruppo.recipe import Recipe
from gruppo.recipe.build import pin
from gruppo.recipe.problems import USUAL_PROMPT
from gruppo.reward import RewardModel
from gruppo.types import Request

_GIB = 2**30
_CHUNK = 512  # positions of which the head makes logits at once (model.logprob)
_COLUMNS = 128  # an own cache grows by so many
# Python and its libraries once a model is open, its weights apart: 0.64 to 0.68 GiB measured.
_OPENED = 13 * _GIB // 20
# Copies of a turn's logits while tokens are drawn: themselves, and those of rows that enter; in
# plain torch softmax, blocks and padding too.
_DRAW_COMPILED, _DRAW = 2, 4


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass of training, and whether its optimizer step has no other."""

    shape: Shape
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, and at each phase's worst moment.

    ``process`` is Python with its libraries (on a CUDA device 0: the plan is the device's).
    ``held`` are the gradients that are there when activations are most: all of them, or, where one
    forward pass is all that an optimizer step needs, the head's, which comes first. ``copies`` are
    those of weights that products have until the step is done.
    ``kept`` is what the engine holds between its calls: keys, values and 16-bit weights, on CUDA.
    ``results`` are the activations of drawn tokens (``engine.max_kept_gib``), whose memory stays.
    ``judges`` are the weights of reward models on the policy's device, ``judging`` the largest of
    their batches.
    """

    process: int
    weights: int
    gradients: int
    held: int
    moments: int
    reference: int
    activations: int
    copies: int
    head: int
    cache: int
    packed: int
    kept: int
    drawing: int
    optimizer: int
    results: int
    judges: int
    judging: int

    @property
    def sampling(self) -> int:
        """While completions are drawn."""
        return self._lasting + self.cache + self.packed + self.drawing

    @property
    def training(self) -> int:
        """At the end of a forward pass, or of the backward pass: then all gradients are there."""
        forward = self.held + self.activations + self.head
        return self._lasting + self.kept + self.copies + max(forward, self.gradients)

    @property
    def updating(self) -> int:
        """While the optimizer moves the weights."""
        return self._lasting + self.kept + self.gradients + self.optimizer

    @property
    def scoring(self) -> int:
        """While a reward model reads completions."""
        return self._lasting + self.kept + self.judging

    @property
    def peak(self) -> int:
        """The most of the four."""
        return max(self.sampling, self.training, self.updating, self.scoring)

    @property
    def _lasting(self) -> int:
        trained = self.weights + self.moments + self.reference
        return self.process + trained + self.judges + self.results

    def text(self) -> str:
        """The plan in one line."""
        phases = {
            "sampling": self.sampling,
            "scoring": self.scoring,
            "training": self.training,
            "update": self.updating,
        }
        worst = max(phases, key=lambda name: phases[name])
        parts = {
            "weights": self.weights,
            "optimizer": self.moments,
            "gradients": self.gradients,
            "reference": self.reference,
            "reward models": self.judges,
            "activations": self.activations + self.copies + self.head,
            "kept activations": self.results,
            "keys and values": self.cache,
        }
        told = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size)
        return f"memory: about {self.peak / _GIB:.1f} GiB at the peak ({worst}); {told} GiB"


def told(recipe: Recipe) -> str:
    """The plan in one line, or why there is none (a model that was not fetched yet, say)."""
    try:
        return memory(recipe).text()
    except (ValueError, OSError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        # a model whose own code does not run on tensors without memory, say
        return f"memory: not known ({str(error)[:200]})"


def memory(
    recipe: Recipe, *, prompt_tokens: int | None = None, largest: Pass | None = None
) -> MemoryPlan:
    """Plan the memory of a run of ``recipe``.

    Args:
        recipe: a checked recipe.
        prompt_tokens: length of every prompt; None takes ``data.max_prompt_tokens``.
        largest: forward pass, if it is known; None takes one as full as the recipe lets it be.

    Raises:
        ValueError, OSError: the model's configuration cannot be had.
    """
    model, rollout = pin(recipe.model), recipe.rollout
    length = prompt_tokens or recipe.data.max_prompt_tokens or USUAL_PROMPT
    compute = torch.bfloat16 if model.compute == "bfloat16" else torch.float32
    largest = largest or _full(recipe, length)
    asked = model.products  # pinned, so never "auto"
    products: Products = asked if asked != "auto" and can_choose(asked, compute) else "torch"
    found = footprint(
        model.name,
        largest.shape,
        revision=model.revision,
        lora=model.lora,
        compute=compute,
        gradient_checkpointing=model.gradient_checkpointing,
        thrift=model.device == "cpu",
        products=products,
        packed=model.packing,
    )
    needs_reference = recipe.objective.build(max_tokens=rollout.max_tokens).needs_reference
    copied = needs_reference and (model.lora is None or recipe.train.reference_sync_steps > 0)
    rows, cached = _drawn_together(recipe, length)
    cache, is_shared = cached * found.cache_per_token, recipe.engine.kind == "shared"
    # a CPU's blocked copies, or 16-bit ones: those a captured step reads, or autocast's
    copied_weights = (is_shared and model.device == "cpu") or compute == torch.bfloat16
    packed = found.linears if copied_weights else 0
    judges, judging = _judges(recipe, model.device)
    results, is_all = _results(recipe, found)
    return MemoryPlan(
        process=process_bytes(recipe),
        weights=found.weights,
        gradients=found.trainable,
        held=_held(found, largest),
        moments=2 * found.trainable,
        reference=found.frozen if copied else 0,
        activations=found.saved - (found.spared if is_all else 0),
        copies=found.copies,
        head=_head(found, largest.shape.positions, products, cpu=model.device == "cpu"),
        cache=cache,
        packed=packed,
        kept=_kept(model.device, cache + packed) if is_shared else 0,
        drawing=rows * found.vocabulary * _copies(model.device),
        optimizer=4 * min(found.largest, (4 if model.device == "cpu" else 256) * SLICE),
        results=results,
        judges=judges,
        judging=judging,
    )


def _results(recipe: Recipe, found: Footprint) -> tuple[int, bool]:
    """What kept activations take, and whether all that a step can train have room."""
    rollout, bound = recipe.rollout, int(recipe.engine.max_kept_gib * _GIB)
    objective = recipe.objective.build(max_tokens=rollout.max_tokens)
    batches = rollout.max_gen_batches if rollout.filter == "resample" else 1
    groups = math.ceil(rollout.prompts_per_step * rollout.oversample) * batches
    rows = groups * (rollout.group_size + objective.needs_greedy)
    every = rows * rollout.max_tokens * found.results
    # what is left over of a step is trained in the next one, when it is not known any more
    return min(bound, every), 0 < every <= bound and rollout.oversample == 1


def process_bytes(recipe: Recipe) -> int:
    """What Python and its libraries take, once a model is open; 0 where a device is planned for."""
    return max(resident_bytes(), _OPENED) if pin(recipe.model).device == "cpu" else 0


def _held(found: Footprint, largest: Pass) -> int:
    """Gradients at the end of a pass; what wraps a model for several ranks has them all along."""
    if largest.alone and dist.world_size() == 1:
        return found.head if found.trainable >= found.head else 0
    return found.trainable


def _judges(recipe: Recipe, device: str) -> tuple[int, int]:
    """Weights of all reward models on ``device``, equal ones once, and their largest batch."""
    reward = recipe.reward.build(max_tokens=recipe.rollout.max_tokens, device=device)
    models = {part.reward for part in reward.parts if isinstance(part.reward, RewardModel)}
    sizes = [
        classifier_bytes(
            model.name,
            tokens=model.tokens_per_batch,
            dtype=torch.bfloat16 if model.dtype == "bfloat16" else torch.float32,
            revision=model.revision,
        )
        for model in models
        if (model.device or "cpu") == device
    ]
    return sum(weights for weights, _ in sizes), max((batch for _, batch in sizes), default=0)


def _kept(device: str, held: int) -> int:
    """What an engine with captured steps does not let go of: all that a quarter would hold."""
    if not device.startswith("cuda"):
        return 0
    if torch.cuda.is_available():
        quarter = torch.cuda.get_device_properties(device).total_memory // 4
        return held if held <= quarter else 0
    return held


def _copies(device: str) -> int:
    return _DRAW_COMPILED if device == "cpu" and kernels() is not None else _DRAW


def _full(recipe: Recipe, prompt: int) -> Pass:
    """The largest micro-batch: completions that all have ``max_tokens``, in as many groups."""
    rollout, budget = recipe.rollout, recipe.train.tokens_per_microbatch
    most = -(-rollout.prompts_per_step // recipe.train.minibatches) * rollout.group_size
    if not recipe.model.packing:  # every completion with its own prompt
        rows = min(most, max(1, budget // (prompt + rollout.max_tokens)))
        shape = Shape(prompts=[prompt] * rows, completions=[[rollout.max_tokens]] * rows)
        return Pass(shape, alone=rows == most)
    rows, used = 0, 0
    while rows < most:
        used += rollout.max_tokens + (prompt if rows % rollout.group_size == 0 else 0)
        if rows and used > budget:
            break
        rows += 1
    whole, rest = divmod(rows, rollout.group_size)
    groups = [rollout.group_size] * whole + [rest] * (rest > 0)
    completions = [[rollout.max_tokens] * size for size in groups]
    shape = Shape(prompts=[prompt] * len(groups), completions=completions)
    return Pass(shape, alone=rows == most)


def _drawn_together(recipe: Recipe, prompt: int) -> tuple[int, int]:
    """Most rows that are decoded at once, and the tokens that there is room for beside them.

    As if every completion had all its tokens: the engine's own plan for such requests is asked.
    """
    rollout, engine = recipe.rollout, recipe.engine
    asked = math.ceil(rollout.prompts_per_step * rollout.oversample)
    requests = [
        Request(tokens=(number,) * prompt, num_samples=rollout.group_size, key=(0, number))
        for number in range(asked)
    ]
    limits, most = [rollout.max_tokens] * asked, engine.max_rows
    if engine.kind == "plain":
        waves = plan_waves(requests, limits, max_rows=most)
        held = []
        for wave in waves:
            copied = len(wave) > len({row.request for row in wave})
            held.append(len(wave) * plain_columns(prompt, rollout.max_tokens, copied=copied))
        return max(map(len, waves)), max(held)
    rows, bound = rows_of(requests, limits), engine.max_cached_tokens
    slots = min(most, len(rows), max(1, bound // rollout.max_tokens) if bound else most)
    columns = -(-rollout.max_tokens // _COLUMNS) * _COLUMNS
    places = _places(Schedule(rows, requests, max_rows=most, max_tokens=bound))
    return slots, slots * columns + places * prompt


def _places(schedule: Schedule) -> int:
    """Most prompts that are held at once, if all rows that run end together."""
    places = 0
    while not schedule.is_done:
        places = max(places, *(admission.place + 1 for admission in schedule.admit()))
        schedule.finish(range(len(schedule.rows)))
    return places


def _head(found: Footprint, positions: int, products: Products, *, cpu: bool) -> int:
    """Logits that are kept, a chunk of others, and a product that is added to the gradient."""
    kept = kept_positions(positions, _CHUNK, found.logits)
    # elsewhere than on a CPU the softmax is a tensor beside the logits
    made = (kept < positions) + (not cpu)
    trained = found.trainable >= found.head
    return (kept + made * _CHUNK) * found.logits + trained * _head_product(found, products)


def _head_product(found: Footprint, products: Products) -> int:
    """A product that is added to the head's gradient: whole in float32 for a wrapper of ranks."""
    if dist.world_size() > 1:
        return found.head
    # the own kernels add what leaves their registers
    return 0 if products == "native" else found.head * found.logits // found.vocabulary
