"""Rules for reward models: what an untrained head cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.schema import Recipe


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
