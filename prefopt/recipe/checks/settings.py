"""Rules across sections: settings that contradict each other, or that nothing would read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule, was_set
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import Recipe


def objective_needs(recipe: Recipe) -> frozenset[Need]:
    """What the recipe's objective needs with its hyper-parameters; nothing for a stage without one."""
    return frozenset() if recipe.objective is None else recipe.objective.needs


def reads_samples(recipe: Recipe) -> bool:
    """Is it trained on rows of one response with a reward or an advantage?"""
    objective = recipe.objective
    return recipe.stage == "preference" and objective is not None and objective.reads_samples


@rule("stage", "objective", "reference", "regime")
def stage_takes_its_sections(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.stage == "preference":
        if recipe.objective is None:
            yield Finding(
                "objective",
                "is missing: stage = 'preference' trains with one, e.g. "
                "objective: {name: simpo, beta: 2.0, gamma: 1.0}; `prefopt objectives` lists them",
            )
        return
    for name in ("objective", "reference", "regime"):
        if name in recipe.model_fields_set and getattr(recipe, name) is not None:
            yield Finding(
                name,
                f"would be ignored: stage = '{recipe.stage}' has its own loss. Leave it out, or set "
                "stage: preference",
            )


@rule("stage", "objective", "reference")
def reference_fits_objective(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    section = recipe.reference
    if recipe.stage != "preference" or recipe.objective is None or section is None:
        return
    name = recipe.objective.name
    if Need.REFERENCE in objective_needs(recipe):
        if section.name == "none":
            yield Finding(
                "reference.name",
                f"objective '{name}' takes its log-ratio against a reference. Use 'initial', or a "
                "reference-free objective such as simpo, orpo or cpo",
            )
    elif section.name != "none":
        yield Finding(
            "reference",
            f"would be ignored: objective '{name}' needs no reference. Leave the section out",
        )


@rule("stage", "objective", "data", "regime")
def offline_data_gives_what_objective_needs(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.stage != "preference" or recipe.objective is None:
        return
    needs = objective_needs(recipe)
    if recipe.has_rollouts:
        return
    for need in sorted({Need.BEHAVIOR, Need.SAMPLES} & needs, key=lambda n: n.value):
        yield Finding(
            "objective.name",
            f"needs {need.value}, which only rollouts have. Set regime.name: rollouts",
        )
    if Need.REWARDS not in needs or Need.PAIRS not in needs:
        return
    for index, source in enumerate(recipe.data.train):
        if not (source.columns.score_chosen and source.columns.score_rejected):
            yield Finding(
                f"data.train.{index}.columns",
                f"objective '{recipe.objective.name}' needs rewards: name the columns with "
                "score_chosen and score_rejected",
            )


@rule("train", "regime")
def order_of_the_data_is_kept_where_it_can_be(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.train.shuffle:
        return
    if recipe.has_rollouts:
        yield Finding("train.shuffle", "rollouts draw their prompts by train.seed. Leave it out")


@rule("train", "data")
def training_keys_are_read(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    train = recipe.train
    if train.optimizer == "rmsprop":
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if was_set(train, key):
                yield Finding(
                    f"train.{key}", "would be ignored: train.optimizer is 'rmsprop'. Leave it out"
                )
        if train.weight_decay:
            yield Finding(
                "train.weight_decay",
                "rmsprop would add it to the gradient instead of decaying the weights. Use 0, or adamw",
            )
    if train.max_steps is not None and was_set(train, "num_epochs"):
        yield Finding(
            "train.num_epochs",
            f"would be ignored: train.max_steps = {train.max_steps} ends the run. Keep one of the two",
        )


@rule("train")
def batch_divides(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    processes = surroundings.num_processes or 1
    if batch % processes:
        below, above = batch // processes * processes, -(-batch // processes) * processes
        use = f"{below} or {above}" if below else f"{above}"
        yield Finding(
            "train.global_batch_size",
            f"does not divide over {processes} processes, and a rank with less to do would make the "
            f"others wait. Use {use}",
        )
    share = max(1, batch // processes)
    if micro is not None and micro > share:
        yield Finding(
            "train.micro_batch_size",
            f"is never reached: global_batch_size = {batch} gives {processes} process(es) {share} "
            f"pair(s) each. Use at most {share}, or leave it out and set micro_batch_tokens",
        )


@rule("model", "train", "peft")
def dtypes_go_together(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    dtype, precision = recipe.model.dtype, recipe.train.precision
    if clash := dtype_clash(dtype, precision):
        yield Finding("train.precision", clash)
    if dtype in _HALF and recipe.peft is None:
        launched = (
            surroundings.num_processes is not None
        )  # `prefopt check` does not know how it will be
        if precision == "fp32" or (launched and not surroundings.keeps_masters):
            yield Finding("model.dtype", half_weights(dtype))
        elif not launched:
            text = f"runs under DeepSpeed and FSDP only: {half_weights(dtype)}"
            yield Finding("model.dtype", text, is_note=True)
    if precision == "fp16" and not surroundings.has_cuda:
        yield Finding(
            "train.precision",
            "needs a CUDA device, and this machine has none. Use bf16 or fp32",
        )
    elif (dtype, precision) == ("float16", "auto") and not surroundings.has_cuda:
        yield Finding(
            "model.dtype",
            "trains on a CUDA device only, and this machine has none. Leave it out, or use float32",
        )


_HALF = {"float16": "fp16", "bfloat16": "bf16"}


def dtype_clash(dtype: str, precision: str) -> str | None:
    """Why a precision does not go with weights loaded in ``dtype``, and what to do; None if it does."""
    if (dtype, precision) not in {("float16", "fp32"), ("float16", "bf16"), ("bfloat16", "fp16")}:
        return None
    return (
        f"does not go with model.dtype = '{dtype}': activations would be cast back and forth "
        f"between the two ranges. Use precision: {_HALF[dtype]} (or leave it out), or model.dtype: float32"
    )


def half_weights(dtype: str) -> str:
    """Why weights of a half dtype cannot be trained as they are, and both ways out."""
    return (
        f"an update is smaller than the distance of two {dtype} numbers, and most of them round to nothing "
        "(200 AdamW steps at 5e-7 moved 1 % of bfloat16 weights). Leave model.dtype out: the weights then "
        f"train in float32, compute in {dtype} and are saved as they came. Or launch with DeepSpeed or FSDP and "
        f"train.precision: {_HALF[dtype]}, which keep float32 masters"
    )


@rule("model", "peft")
def quantization_has_what_it_needs(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    if recipe.model.quantization is None:
        return
    if recipe.peft is None:
        yield Finding(
            "model.quantization",
            "quantised weights are frozen: there is nothing to train without a peft section. Add "
            "peft: {type: lora, r: 16}, or leave quantization out",
        )
    if not surroundings.has_cuda:
        yield Finding(
            "model.quantization",
            "bitsandbytes needs a CUDA device, and this machine has none. Leave it out here, or check "
            "for another machine with --assume-cuda",
        )


@rule("run")
def trackers_exist(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if not recipe.run.trackers:
        return
    from accelerate import tracking

    for index, name in enumerate(recipe.run.trackers):
        known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            yield Finding(
                f"run.trackers.{index}", f"unknown tracker; {hint}Known: {', '.join(known)}."
            )
        elif name not in {str(getattr(t, "value", t)) for t in tracking.get_available_trackers()}:
            yield Finding(
                f"run.trackers.{index}",
                f"its package is not installed here, and accelerate would skip it without a word. "
                f"pip install {name.replace('_', '-')}, or leave it out (metrics.jsonl is always there)",
            )
