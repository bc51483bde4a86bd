"""From a recipe's ``eval.generation`` to a probe of the policy in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from prefopt.data import Renderer, load_prompts
from prefopt.data.samples import SampleNeeds
from prefopt.engines.base import SamplingSpec
from prefopt.engines.hf import HFEngine
from prefopt.errors import ConfigError, EngineError
from prefopt.model.load import LoadedPolicy
from prefopt.model.windows import GroupSource
from prefopt.recipe.registry import bind_objective
from prefopt.recipe.schema import EngineSection, GenerationSection, Recipe
from prefopt.rollouts.setup import prompt_fields
from prefopt.signals.base import Prompt
from prefopt.signals.combine import build_signals
from prefopt.training.generation_probe import GenerationProbe, ProbeParts


def build_probe(
    recipe: Recipe,
    policy: LoadedPolicy,
    tokenizer: Any,
    held_out: GroupSource | None,
    accelerator: Accelerator,
) -> GenerationProbe | None:
    """The probe, or None where the recipe asks for none. Called when the policy is on its device.

    Raises: ConfigError for a policy whose parameters are sharded; DataError for prompts that cannot be read.
    """
    section = recipe.eval.generation
    if section is None:
        return None
    engine = _engine(recipe, policy, tokenizer)
    prompts = _prompts(recipe, section, tokenizer, held_out)
    signals = None
    if section.prompts and section.score and recipe.signals and accelerator.is_main_process:
        signals = build_signals(recipe.signals)

    def decode(sequences: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(ids) for ids in sequences], skip_special_tokens=True)

    spec = SamplingSpec(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        stop_token_ids=Renderer(tokenizer).stop_ids(chat=tokenizer.chat_template is not None),
    )
    parts = ProbeParts(engine, prompts, spec, recipe.train.seed, decode, signals)
    return GenerationProbe(parts, accelerator, Path(recipe.run.output_dir))


def _engine(recipe: Recipe, policy: LoadedPolicy, tokenizer: Any) -> HFEngine:
    engine = recipe.engine or EngineSection()
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.precision]
    try:
        # It shares every weight: no copy, nothing to push, and a module of its own, so that whatever
        # generating sets (eval mode, ordinary attention, a cache) never reaches the one in training.
        return HFEngine.sharing(
            policy.model,
            share_trainable=True,
            pad_id=tokenizer.pad_token_id or 0,
            batch_size=engine.batch_size,
            dtype=dtype,
            timeout_s=engine.timeout_s,
        )
    except EngineError as error:
        raise ConfigError(
            "eval.generation: the policy's parameters are sharded over processes (ZeRO-3, FSDP), and generating "
            "would gather every layer for every token. Leave it out, and evaluate checkpoints beside the run: "
            "prefopt eval RUN --checkpoints; or train with ddp, zero1 or zero2"
        ) from error


def _prompts(
    recipe: Recipe, section: GenerationSection, tokenizer: Any, held_out: GroupSource | None
) -> list[Prompt]:
    """The first ``num_prompts`` different ones."""
    if section.prompts:
        fields = prompt_fields(recipe) if section.score else ()
        needs = bind_objective(recipe.objective or {}).needs
        found = load_prompts(
            section.prompts,
            recipe.data,
            Renderer(tokenizer),
            max_new_tokens=section.max_new_tokens,
            fields=fields,
            condition=SampleNeeds.of(needs, recipe.data).condition,
        ).prompts
        return list(found[: section.num_prompts])
    assert held_out is not None  # the check has seen to it
    prompts: dict[tuple[int, ...], Prompt] = {}
    for index in range(len(held_out)):
        if len(prompts) == section.num_prompts:
            break
        group = held_out.group(index)
        text = tokenizer.decode(list(group.prompt_ids))
        prompts.setdefault(group.prompt_ids, Prompt(group.id, group.prompt_ids, text))
    return list(prompts.values())
