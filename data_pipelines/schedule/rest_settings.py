"""The file of `prefopt data rest`: a schedule of grow and improve steps, and what can be wrong with it as such."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from data_pipelines.schedule.kinds import LaunchSettings
from data_pipelines.schedule.settings import launch_problems
from data_pipelines.stages.threshold import RULES
from prefopt.recipe.schema import NonNegativeFloat, PathText, Section, SourceSection
from prefopt.recipe.yaml_file import Document

_Percent = Annotated[float, Field(ge=0, le=100)]
_Gamma = Annotated[float, Field(ge=0, le=1)]


class GrowSection(Section):
    """Grow: samples of the newest policy, scored. Also takes `seed` and the other keys of a pipeline.

    `prefopt data keys` lists those; output_dir is the schedule's.
    """

    model_config = ConfigDict(extra="allow")

    steps: PositiveInt
    """How many. Each samples anew, from the best policy so far; its seed is the pipeline's, plus one a step."""
    stages: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)]
    """Stages that end with scored groups, or samples. A `sample` stage asks `${policy}`. To mix the original data
    in, as ReST does, start with `rated` and mark its response `offline: true`: samples join it, and the same
    signal scores both. With `prompts` there are the policy's own samples alone, as in ReST-EM."""


class ImproveSection(Section):
    """Improve: training passes over the samples of a grow step, each above a higher threshold.

    One of `above`, `percentile` and `gamma` gives the thresholds, one an improve step, rising.
    """

    above: Annotated[tuple[float | None, ...], Field(strict=False, min_length=1)] | None = None
    """Rewards to exceed, e.g. `[0.7, 0.8, 0.9]`; `null` as the first takes every sample."""
    percentile: Annotated[tuple[_Percent, ...], Field(strict=False, min_length=1)] | None = None
    """Percentiles of the rewards to exceed, e.g. `[50, 75, 90]`."""
    gamma: Annotated[tuple[_Gamma, ...], Field(strict=False, min_length=1)] | None = None
    """γ of the thresholds γ·max + (1 - γ)·mean, e.g. `[0, 0.5, 0.9]`."""
    over: Literal["prompt", "all"] = "prompt"
    """Whose rewards `percentile` and `gamma` are of."""
    keep_equal: bool = False
    """As of the stage `threshold`: also keep a reward equal to the threshold."""
    max_per_prompt: PositiveInt | None = None
    """Most samples of a prompt (ReST-EM: 10)."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]
    """One an improve step (ReST lowers it), or a single one for all."""
    start: Literal["previous", "base"] = "previous"
    """Whose weights a step trains: the previous improve step's, the first step's the policy that sampled (ReST),
    or always those of `policy` (ReST-EM)."""

    @property
    def rule(self) -> str:
        """The key that gives the thresholds. Only of sound settings."""
        return next(key for key in RULES if getattr(self, key) is not None)

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        return getattr(self, self.rule)

    def learning_rate(self, number: int) -> float:
        """Of improve step ``number``, from 1."""
        return self.learning_rates[number - 1 if len(self.learning_rates) > 1 else 0]

    def stage(self, number: int) -> dict[str, Any]:
        """The `threshold` stage of improve step ``number``, from 1."""
        stage: dict[str, Any] = {"stage": "threshold", "id": f"improve-{number}"}
        stage[self.rule] = self.thresholds[number - 1]
        stage |= {"over": self.over} if self.rule != "above" else {}
        stage |= {"keep_equal": True} if self.keep_equal else {}
        return stage | ({"max_per_prompt": self.max_per_prompt} if self.max_per_prompt else {})


class ValidationSection(Section):
    """Reward on held-out prompts, before the first step and after each: sampled and scored as `grow` does it."""

    sources: Annotated[tuple[SourceSection, ...], Field(strict=False, min_length=1)]
    """Held-out prompts, as a recipe's `data.prompts`."""
    max_prompts: PositiveInt | None = None
    """Take only the first so many."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each, the same seeds for every policy."""
    temperature: NonNegativeFloat = 1.0
    """Of those answers; 0 is greedy."""
    min_gain: NonNegativeFloat = 0.0
    """A gain is a reward that is higher by more than this than the best one before."""
    patience: PositiveInt = 1
    """Improve steps in a row without a gain after which a grow step takes no more of them. A grow step without
    any gain ends the schedule."""


class RestSettings(LaunchSettings):
    """ReST (arXiv:2308.08998) and ReST-EM (arXiv:2312.06585): grow a set of samples, improve on the best of it.

    Placeholders in `grow.stages` and `recipe`: `${policy}` is the policy that the grow step samples from,
    `${first}` that of the schedule, `${grow}` and `${improve}` the numbers of the steps; in `recipe` also
    `${data}`, the samples above the step's threshold.
    """

    output_dir: PathText
    """`grow-1/`, `grow-2/`, …: each holds its samples in `data/`, and `improve-1/`, …: recipe, run, validation."""
    policy: PathText
    """The policy that the first grow step samples from: model, adapter or run directory."""
    grow: GrowSection
    improve: ImproveSection
    recipe: dict[str, Any]
    """The training recipe of an improve step, as `prefopt train` takes it: any objective for one response a row.
    `filtered_nll` is the plain NLL here: `improve` filters, and a threshold of its own is refused. Its data
    names `${data}`; model, adapter, learning rate and output_dir are the schedule's to set."""
    validation: ValidationSection | None = None
    """With it the best policy is kept, and a schedule that brings nothing more ends early. Without, every step is
    taken, and the last improve step's policy is the one that grows (as in the paper)."""


BELOW_EVERY_REWARD = -1e30
"""Of an objective that filters too: `improve` has filtered, and a second threshold would drop what it kept."""


def filters(recipe: Mapping[str, Any]) -> bool:
    """Does the recipe's objective have a threshold on rewards of its own?"""
    objective = recipe.get("objective")
    return isinstance(objective, dict) and objective.get("name") == "filtered_nll"


def rest_problems(settings: RestSettings, document: Document) -> Iterator[str]:
    """What is wrong with a schedule's own settings, with lines."""
    yield from launch_problems(settings, document)
    if "output_dir" in (settings.grow.model_extra or {}):
        yield (
            f"{document.origin(('grow', 'output_dir'))}grow.output_dir: would be ignored: samples go below the "
            "schedule's output_dir; leave it out"
        )
    yield from _threshold_problems(settings.improve, document)
    yield from _recipe_problems(settings.recipe, document)


def _threshold_problems(improve: ImproveSection, document: Document) -> Iterator[str]:
    given = [key for key in RULES if getattr(improve, key) is not None]
    if len(given) != 1:
        have = " and ".join(given) or "none"
        yield (
            f"{document.origin(('improve',))}improve: takes its thresholds from one of {', '.join(RULES)}, and "
            f"has {have}"
        )
        return
    key, values = improve.rule, improve.thresholds
    where = f"{document.origin(('improve', key))}improve.{key} = {_shown(values)}"
    if None in values[1:]:
        yield f"{where}: null takes every sample, so only the first threshold can be null"
    elif not all(a < b for a, b in pairwise(-math.inf if v is None else v for v in values)):
        yield f"{where}: thresholds must rise: a step trains on the better part of the step before"
    top = {"percentile": 100, "gamma": 1}.get(key)
    if top is not None and values[-1] == top and not improve.keep_equal:
        yield (
            f"{where}: no reward is above the best one, so {top} keeps nothing. Lower it, or set "
            "improve.keep_equal: true"
        )
    if key == "above" and "over" in improve.model_fields_set:
        yield (
            f"{document.origin(('improve', 'over'))}improve.over: would be ignored: a fixed threshold is the same "
            "for all; leave it out"
        )
    if len(improve.learning_rates) not in (1, len(values)):
        yield (
            f"{document.origin(('improve', 'learning_rates'))}improve.learning_rates = "
            f"{_shown(improve.learning_rates)}: {len(improve.learning_rates)} for {len(values)} improve steps "
            f"(improve.{key}); give one for each, or a single one for all"
        )


def _recipe_problems(recipe: Mapping[str, Any], document: Document) -> Iterator[str]:
    data = recipe.get("data")
    if "${data}" not in str(data.get("train") if isinstance(data, dict) else None):
        yield (
            f"{document.origin(('recipe', 'data'))}recipe.data.train: names no ${{data}}, so the samples would "
            "not be trained on; write data: {train: [{path: '${data}'}]}"
        )
    for section, key, instead in (
        ("train", "learning_rate", "improve.learning_rates"),
        ("run", "output_dir", "output_dir"),
        ("model", "path", "policy"),
        ("peft", "adapter", "policy"),
    ):
        found = recipe.get(section)
        if isinstance(found, dict) and key in found:
            yield (
                f"{document.origin(('recipe', section, key))}recipe.{section}.{key}: would be ignored: the "
                f"schedule sets it, from {instead}; leave it out"
            )

    if filters(recipe) and "threshold" in recipe["objective"]:
        yield (
            f"{document.origin(('recipe', 'objective', 'threshold'))}recipe.objective.threshold = "
            f"{recipe['objective']['threshold']}: would filter a second time, after improve, and drop samples "
            "that improve keeps wherever rewards can be lower (null, percentile, gamma); leave it out"
        )


def _shown(values: Sequence[float | None]) -> str:
    return "[" + ", ".join("null" if value is None else f"{value:g}" for value in values) + "]"
