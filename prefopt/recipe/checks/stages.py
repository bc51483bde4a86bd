"""Rules for the stages TRL trains (``sft``, ``reward_model``): what its trainers cannot honour is refused."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.schema import Recipe

# Trackers that accelerate (preference runs) and transformers (TRL's trainers) know under one name.
_TRACKERS = (
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)


@rule("stage", "model")
def trl_pads_its_batches(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.stage != "preference" and recipe.model.layout == "packed":
        yield Finding(
            "model.layout",
            f"stage = '{recipe.stage}' runs TRL's trainer, which pads its batches (its own packing needs "
            "FlashAttention on a GPU). Leave it out, or set padded",
        )


@rule("stage", "run")
def trl_knows_the_trackers(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for index, tracker in enumerate(recipe.run.trackers if recipe.stage != "preference" else ()):
        if tracker not in _TRACKERS:
            yield Finding(
                f"run.trackers.{index}", f"stage = '{recipe.stage}' logs to {', '.join(_TRACKERS)}"
            )


@rule("stage", "peft")
def reward_model_starts_from_a_full_model(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if (
        recipe.stage == "reward_model"
        and recipe.peft is not None
        and recipe.peft.adapter is not None
    ):
        yield Finding(
            "peft.adapter",
            "an adapter of a language model has no reward head. Write the merged model with "
            "`prefopt merge`, put it in model.path and train a new adapter",
        )


@rule("stage", "model")
def reward_model_is_not_quantized(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.stage == "reward_model" and recipe.model.quantization is not None:
        yield Finding(
            "model.quantization",
            "quantising a reward model would quantise its untrained head too. Leave it out",
        )
