"""Rules about weighted samples: how their rewards are scaled and written into prompts, and on what."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.checks.settings import objective_needs, reads_samples
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import Recipe


@rule("data", "stage", "regime", "objective")
def rewards_are_scaled_where_they_are_read(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.data.normalize_rewards == "none":
        return
    key = "data.normalize_rewards"
    if recipe.has_rollouts:
        yield Finding(
            key,
            "is for the rows of a data set, and rollouts are scored as they come. Weigh the signals, or take "
            "the credit group_mean_std",
        )
    elif not reads_samples(recipe):
        yield Finding(
            key, "would be ignored: the objective reads no rewards of samples. Leave it out"
        )
    elif Need.REWARDS not in objective_needs(recipe) and recipe.data.sampling.name != "reward":
        yield Finding(
            key,
            "would be ignored: the objective goes by advantages, which stay as the data has them. Scale the "
            "rewards before the advantages are taken, or leave it out",
        )


@rule("data", "stage", "regime", "objective", "train")
def draws_are_of_samples(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    section, key = recipe.data.sampling, "data.sampling.name"
    if section.name == "uniform":
        for name in sorted({"replacement", "scale_steps"} & section.model_fields_set):
            yield Finding(
                f"data.sampling.{name}",
                "would be ignored: data.sampling.name is 'uniform', which takes every row once an epoch",
            )
        return
    if recipe.has_rollouts:
        yield Finding(key, "is for a fixed data set, and rollouts are sampled. Leave it out")
    elif not reads_samples(recipe):
        yield Finding(
            key, "rows of this run have no advantage or reward to be drawn by. Leave it out"
        )
    if not recipe.train.shuffle:
        yield Finding(
            "train.shuffle", f"data.sampling.name = '{section.name}' draws. Leave one of them out"
        )


@rule("data", "stage", "regime", "objective")
def the_reward_goes_into_the_prompt_where_it_is_known(
    recipe: Recipe, _: Surroundings
) -> Iterator[Finding]:
    condition, takes = recipe.data.condition, Need.CONDITION in objective_needs(recipe)
    if condition is not None and not takes:
        yield Finding(
            "data.condition",
            "would be ignored: only the objective reward_conditioned reads it. Leave it out",
        )
    if takes and recipe.has_rollouts:
        assert recipe.objective is not None
        yield Finding(
            "objective.name",
            "writes the reward of a response into its prompt, and a rollout's prompt is there before its "
            "reward is. Use regime.name: offline, on samples that `prefopt data` has scored",
        )
    for name in ("{input}", "{reward}"):
        if condition is not None and name not in condition.template:
            yield Finding(
                "data.condition.template",
                f"must hold {name}: "
                + ("the prompt" if name == "{input}" else "what is conditioned on"),
            )


@rule("eval", "data", "stage", "objective")
def the_probe_asks_for_the_target(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    section = recipe.eval.generation
    if section is None or Need.CONDITION not in objective_needs(recipe) or section.prompts:
        return
    yield Finding(
        "eval.generation.prompts",
        "is missing: the prompts of held-out rows hold those rows' rewards, and the probe asks for "
        "data.condition.target. Name sources of prompts",
    )
