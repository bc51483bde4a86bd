"""The schedule of `prefopt data round`: data from the newest policy, training on it, and again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from data_pipelines.schedule.base import NOTHING, Loop, LoopSettings, Schedule, Step, StepSettings
from data_pipelines.schedule.filling import final_policy
from data_pipelines.schedule.kinds import EvalStep, LaunchSettings, PipelineStep, RecipeStep
from data_pipelines.schedule.settings import launch_problems, sound_settings
from prefopt.recipe.schema import PathText, Section
from prefopt.recipe.yaml_file import apply_overrides, read_yaml


class RoundEval(Section):
    """An evaluation after each round: `prefopt eval`."""

    tasks: str
    """As its `--tasks`."""
    settings: tuple[str, ...] = Field(default=(), strict=False)
    """Its `section.key=value`."""


class RoundsSettings(LaunchSettings):
    """Rounds: which pipelines make the data of a round, which recipe trains on it.

    In the pipelines and the recipe, `${policy}` is the newest policy, `${previous}` the one before it,
    `${first}` that of the first round, `${round}` the number of the round, `${data}` what the last pipeline
    made, `${data.NAME}` what the pipeline NAME.yaml made.
    """

    output_dir: PathText
    """`round-1/`, `round-2/`, …: each holds its pipelines, their data, the recipe and the run."""
    num_rounds: PositiveInt
    """How many."""
    policy: PathText
    """The policy that the first round samples from and trains: model, adapter or run directory."""
    pipelines: Annotated[tuple[PathText, ...], Field(strict=False, min_length=1)]
    """Pipelines of a round, in order; the last one's rows are trained on."""
    first_pipelines: tuple[PathText, ...] = Field(default=(), strict=False)
    """Pipelines of the first round, where they differ (SeRA's first round trains on the offline pairs)."""
    recipe: PathText
    """The training recipe. Its model, adapter and output_dir are set by the round; its data names `${data}`."""
    trains: Literal["newest", "first"] = "newest"
    """What a round trains: on from the newest policy (iterative DPO), or the first one anew on better data."""
    eval: RoundEval | None = None
    """Leave out to evaluate nothing."""


def load_rounds(path: Path, overrides: Sequence[str] = ()) -> Schedule:
    """The schedule of a rounds file. Raises: ConfigError with every problem and its line."""
    document = apply_overrides(read_yaml(path), overrides)
    settings = sound_settings(RoundsSettings, document, path, launch_problems)
    first = final_policy(settings.policy)
    rounds = LoopSettings(
        name="round",
        rounds=settings.num_rounds,
        start={"train": first, "policy": first},
        values={"policy": "${previous.train}", "previous": "${previous.policy}"},
    )
    loop = Loop(rounds, [*_pipelines(settings), _training(settings), *_evaluation(settings)])
    problems = []
    if "${data}" not in json.dumps(read_yaml(Path(settings.recipe)).raw.get("data")):
        problems.append(
            f"{settings.recipe}: data: names no ${{data}}, so the rounds' pairs would not be trained on; write "
            "data: {train: [{path: '${data}'}]}"
        )
    return Schedule("rounds", path, Path(settings.output_dir), [loop], {"first": first}, problems)


def _pipelines(settings: RoundsSettings) -> Iterator[Step]:
    differ = bool(settings.first_pipelines)
    for when, files in (
        ("first", settings.first_pipelines),
        ("later" if differ else "always", settings.pipelines),
    ):
        for file in map(Path, files):
            also = ("data", f"data.{file.stem}")
            own = PipelineStep(name=file.stem, when=when, also=also, pipeline=str(file))  # type: ignore[arg-type]
            yield _step(own, file, output=f"data/{file.stem}")


def _training(settings: RoundsSettings) -> Step:
    """An adapter is trained on from round to round, a full model gets a new one."""
    trains = "${policy}" if settings.trains == "newest" else "${first}"
    launch: dict[str, Any] = {"launch": settings.launch, "script": settings.script}
    own = RecipeStep(name="train", recipe=settings.recipe, trains=trains, **launch)
    return _step(own, Path(settings.recipe), file="recipe.yaml")


def _evaluation(settings: RoundsSettings) -> Iterator[Step]:
    if settings.eval is not None:
        own = EvalStep(name="eval", eval="${train}", **settings.eval.model_dump())
        yield Step(own, NOTHING, Path(), "eval")


def _step(own: StepSettings, path: Path, file: str = "", output: str = "") -> Step:
    return Step(own, read_yaml(path), path, str(path), file=file, output=output)
