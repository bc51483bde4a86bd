"""Rules about what is evaluated while training: that there is something, and that the trainer can."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.schema import Recipe


@rule("eval", "data")
def there_is_something_to_evaluate(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    held_out = bool(recipe.data.eval or recipe.data.eval_frac)
    section = recipe.eval
    if section.every is not None and not held_out and section.generation is None:
        yield Finding(
            "eval.every",
            "would be ignored: there is nothing to evaluate on. Give data.eval or data.eval_frac, or "
            "eval.generation",
        )
    if section.generation is not None and not section.generation.prompts and not held_out:
        yield Finding(
            "eval.generation.prompts",
            "there are no held-out prompts to answer. Give sources here, or data.eval or data.eval_frac",
        )


@rule("eval", "stage", "model", "data")
def the_trainer_can_generate(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    section = recipe.eval.generation
    if section is None:
        return
    if recipe.stage == "reward_model":
        yield Finding("eval.generation", "a reward model generates nothing. Leave it out")
    if section.prompts and section.max_new_tokens >= recipe.data.max_length_tokens:
        yield Finding(
            "eval.generation.max_new_tokens",
            f"leaves no room for a prompt in data.max_length_tokens = {recipe.data.max_length_tokens}",
        )


@rule("eval", "data")
def the_best_step_can_be_told(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    section = recipe.eval
    if section.best is None or not section.best.metric.startswith("eval/"):
        return
    if section.every is None:
        yield Finding(
            "eval.best.metric",
            "is measured only before the first step and after the last, so there is no best to find. Set "
            "eval.every",
        )
    if section.best.metric.startswith("eval/generation/"):
        if section.generation is None:
            yield Finding(
                "eval.best.metric", "is of answers, and none are given. Add eval.generation"
            )
    elif not (recipe.data.eval or recipe.data.eval_frac):
        yield Finding(
            "eval.best.metric",
            "is of held-out rows, and there are none. Give data.eval or data.eval_frac",
        )
