"""From a recipe to the objects of a run: model, policy, engine, rewards, problems, directory.

This is the only place where settings become objects. It trains nothing and prints nothing; what
is slow or worth knowing is told to ``report``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

from gruppo.data import ProblemStream
from gruppo.engine import LocalEngine
from gruppo.environment import Environment, Episodes, VerifiersEnvironment
from gruppo.evaluate import Evaluator
from gruppo.interrupt import ending_with
from gruppo.model import (
    Activations,
    Encoder,
    Loaded,
    Products,
    attach,
    can_choose,
    compute_dtype,
    end_ids,
    faster_products,
    load,
)
from gruppo.model.parts import context_length
from gruppo.objective import Objective
from gruppo.policy import Policy
from gruppo.recipe.answers import refuse_wrong_grading
from gruppo.recipe.calls import calls_mismatch
from gruppo.recipe.environment import probe
from gruppo.recipe.problems import (
    Splits,
    open_problems,
    prompt_limit,
)
from gruppo.recipe.recipe import ModelSection, Recipe
from gruppo.reward import Code, Opens, RewardSet
from gruppo.rollout import Rollouts

Report = Callable[[str], None]
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model ready to draw: on its device, with encoder and engine, trained by nobody yet.

    ``environment`` answers its turns; None: completions are one turn.
    """

    loaded: Loaded
    model: torch.nn.Module
    encoder: Encoder
    engine: LocalEngine
    compute: torch.dtype
    products: Products
    environment: Environment | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a recipe stands for but the run directory.

    ``recipe`` says which device and number format are used where the recipe given said "auto".
    """

    recipe: Recipe
    opened: Opened
    objective: Objective
    policy: Policy
    reward: RewardSet
    problems: Splits
    rollouts: Rollouts
    evaluator: Evaluator | None

    def close(self) -> None:
        """End worker processes and free the engine."""
        self.reward.close()
        if isinstance(self.opened.environment, VerifiersEnvironment):
            self.opened.environment.close()
        self.opened.engine.close()


def pin(section: ModelSection) -> ModelSection:
    """Return ``section`` with the device, format and library that "auto" means on this machine.

    They are recorded with a run, because a format that is measured anew may come out otherwise.

    Raises:
        ValueError: the device is not here.
    """
    device = _device(section.device)
    compute = section.compute
    if compute == "auto":
        compute = "bfloat16" if compute_dtype(device) == torch.bfloat16 else "float32"
    products = _products(section, device, _DTYPES[compute])
    return replace(section, device=device, compute=compute, products=products)


def open_model(section: ModelSection, recipe: Recipe, report: Report) -> Opened:
    """Open the model of ``section`` (not always the recipe's: a checkpoint may take its place).

    Raises:
        ValueError: a model, device or format that cannot be used.
        OSError: a download or the disk failed.
    """
    section = pin(section)
    dtype = _DTYPES[section.compute]
    products = _products(section, section.device, dtype)
    by = _told(products, section.device, dtype)
    report(f"model: {section.name} on {section.device}, products in {section.compute}{by}")
    loaded = load(
        section.name,
        device=section.device,
        revision=section.revision,
        gradient_checkpointing=section.gradient_checkpointing,
        report=report,
    )
    model = loaded.model
    if section.lora is not None:
        model = attach(model, section.lora, compute_dtype=dtype)
    environment = recipe.environment.open(report)
    encoder = _encoder(loaded, recipe, environment)
    if environment is not None and (told := calls_mismatch(environment, encoder)):
        report(f"warning: {told}")
    engine = LocalEngine(
        model,
        encoder.decode,
        pad_token=encoder.pad_token,
        compute_dtype=dtype,
        max_rows=recipe.engine.max_rows,
        max_cached_tokens=recipe.engine.max_cached_tokens,
        kind=recipe.engine.kind,
        products=products,
        activations=Activations(int(recipe.engine.max_kept_gib * 2**30)),
    )
    if recipe.engine.kind == "shared" and not engine.is_shared:
        report(f"engine: {section.name} cannot share prompts, so it is drawn in plain waves")
    return Opened(
        loaded=loaded,
        model=model,
        encoder=encoder,
        engine=engine,
        compute=dtype,
        products=products,
        environment=environment,
    )


def _encoder(loaded: Loaded, recipe: Recipe, environment: Environment | None) -> Encoder:
    """The encoder, which tells of an environment's tools and can continue after a turn."""
    encoder = Encoder(
        loaded.tokenizer,
        chat=recipe.data.chat,
        template_options=recipe.data.template_options,
        stop_tokens=end_ids(loaded.model.generation_config),
        tools=() if environment is None else environment.tools,
        instructions="" if environment is None else environment.instructions,
    )
    if environment is not None:
        encoder.continuation(probe(environment), after=encoder.stop_tokens[0])
    return encoder


def make_sampler(recipe: Recipe, opened: Opened) -> Episodes | None:
    """What draws episodes with the recipe's environment; None if completions are one turn."""
    if opened.environment is None:
        return None
    return Episodes(
        engine=opened.engine,
        environment=opened.environment,
        encoder=opened.encoder,
        limits=recipe.environment.limits(),
        context=context_length(opened.model),
    )


def open_rewards(recipe: Recipe, report: Report) -> RewardSet:
    """Make the rewards and open them: a wrong name, a missing key or sandbox is found now."""
    device = _device(recipe.model.device)
    reward = recipe.reward.build(max_tokens=recipe.rollout.max_tokens, device=device)
    for part in reward.parts:
        if isinstance(part.reward, Code):
            report(f"reward {part.name}: {part.reward.open(report).text}")
        elif isinstance(part.reward, Opens):
            part.reward.open()
    return reward


def resolve(recipe: Recipe, report: Report) -> Parts:
    """Make the objects of a recipe: rewards first, because they fail fastest, then model and data.

    Raises:
        ValueError: something named in the recipe cannot be used as meant.
        OSError: a file, download or hub failed.
    """
    reward = open_rewards(recipe, report)
    try:
        with ending_with(reward.close):
            return _resolve(recipe, reward, report)
    except BaseException:
        reward.close()
        raise


def _resolve(recipe: Recipe, reward: RewardSet, report: Report) -> Parts:
    recipe = replace(recipe, model=pin(recipe.model))
    opened = open_model(recipe.model, recipe, report)
    problems = open_problems(
        recipe.data,
        opened.encoder.encode,
        report,
        max_prompt_tokens=prompt_limit(recipe, context_length(opened.model)),
        environment=opened.environment,
    )
    refuse_wrong_grading(recipe.reward, reward, problems, report)
    return _assemble(recipe, opened, reward, problems, report)


def _assemble(
    recipe: Recipe, opened: Opened, reward: RewardSet, problems: Splits, report: Report
) -> Parts:
    objective = recipe.objective.build(max_tokens=recipe.rollout.max_tokens)
    policy = Policy(
        opened.model,
        optim=recipe.optim,
        total_updates=recipe.train.num_updates,
        compute_dtype=opened.compute,
        reference=_reference(recipe, objective),
        temperature=recipe.rollout.temperature,
        packing=recipe.model.packing,
        products=opened.products,
        activations=opened.engine.activations,
    )
    if recipe.engine.max_kept_gib and not (opened.engine.can_keep and policy.fused):
        report(
            f"engine: max_kept_gib = {recipe.engine.max_kept_gib:g} keeps nothing: it needs a "
            'model of Llama\'s kind on a CPU, products = "native", and packing'
        )
    if recipe.model.packing and not policy.packed:
        report(
            f"policy: {recipe.model.name} cannot be packed, so each completion has its own prompt"
        )
    rollouts = Rollouts(
        engine=opened.engine,
        encoder=opened.encoder,
        reward=reward,
        stream=ProblemStream(
            problems.train,
            seed=recipe.train.seed,
            curriculum=recipe.data.curriculum,
            dropped=problems.dropped,
        ),
        settings=recipe.rollout,
        seed=recipe.train.seed,
        greedy_baseline=objective.needs_greedy,
        sampler=make_sampler(recipe, opened),
    )
    return Parts(
        recipe=recipe,
        opened=opened,
        objective=objective,
        policy=policy,
        reward=reward,
        problems=problems,
        rollouts=rollouts,
        evaluator=make_evaluator(recipe, opened, reward, problems),
    )


def make_evaluator(
    recipe: Recipe, opened: Opened, reward: RewardSet, problems: Splits
) -> Evaluator | None:
    """The evaluator of the held-out problems; None if there are none."""
    if not problems.held_out:
        return None
    return Evaluator(
        engine=opened.engine,
        encoder=opened.encoder,
        reward=reward,
        problems=problems.held_out,
        settings=recipe.eval,
        sampling=recipe.rollout.sampling(opened.encoder.stop_tokens),
        sampler=make_sampler(recipe, opened),
    )


def _reference(recipe: Recipe, objective: Objective) -> Literal["none", "copy", "adapter"]:
    """An adapter switched off is a reference for nothing, but it cannot move."""
    if not objective.needs_reference:
        return "none"
    still = recipe.train.reference_sync_steps == 0
    return "adapter" if recipe.model.lora is not None and still else "copy"


def _products(section: ModelSection, device: str, compute: torch.dtype) -> Products:
    if section.products != "auto":
        return section.products
    return "torch" if section.gradient_checkpointing else faster_products(device, compute)


def _told(products: Products, device: str, compute: torch.dtype) -> str:
    """By what they are made, where that is not torch as ever."""
    if products == "torch" or device != "cpu":
        return ""
    if not can_choose(products, compute):
        return f' by torch (products = "{products}" cannot be had here in that type)'
    return {"onednn": " by oneDNN", "native": " by own kernels"}[products]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not _is_here(torch.device(name)):
        raise ValueError(
            f'model.device = "{name}": torch can use no such device here; choose another (cpu, '
            "cuda, mps or xpu). A run keeps its device in its recipe.toml: change it there to "
            "resume, or for eval and chat with --set model.device=cpu"
        )
    return name


def _is_here(device: torch.device) -> bool:
    index = device.index or 0
    match device.type:
        case "cuda":
            return torch.cuda.is_available() and index < torch.cuda.device_count()
        case "xpu":
            return torch.xpu.is_available() and index < torch.xpu.device_count()
        case "mps":
            return torch.backends.mps.is_available()
        case _:
            return True
