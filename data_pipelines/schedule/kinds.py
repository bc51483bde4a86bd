"""The kinds of steps, each a class and a line of `KINDS`: a pipeline, a recipe, an evaluation."""

from __future__ import annotations

import contextlib
import math
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

from pydantic import Field

from data_pipelines.folder import StageFolder
from data_pipelines.pipeline import Pipeline, parse_pipeline
from data_pipelines.rows import RowKind
from data_pipelines.schedule.base import Found, StepSettings, Task
from data_pipelines.schedule.filling import final_policy, put, set_to_train, with_plugins
from prefopt.errors import ConfigError
from prefopt.recipe.checks.rules import Surroundings, apply_rules
from prefopt.recipe.checks.settings import objective_needs, reads_samples
from prefopt.recipe.load import draft_document
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import PathText, Recipe, Section
from prefopt.recipe.scripts import RECIPE_SCRIPTS, script_of
from prefopt.storage.reading import as_object, load_json, reading
from prefopt.storage.run_files import METRICS_FILE, read_metrics

_METRICS = ("loss", "rewards/accuracy", "rewards/margin", "eval/rewards/accuracy", "eval/reward")


class LaunchSettings(Section):
    """What training is started with."""

    launch: str = ""
    """What training is started with, e.g. `accelerate launch --config_file accelerate_configs/zero3.yaml`;
    default: this machine, one process."""
    script: PathText | None = None
    """Script that is launched, e.g. recipes/dpo.py; needed with `launch`."""


class PipelineStep(StepSettings):
    """A pipeline, as of `prefopt data build`; `${NAME}` is the folder of its last stage.

    `${NAME.score}` is the mean of the scores, where it ends with scored groups.
    """

    HAS_FILE: ClassVar = True

    pipeline: PathText | dict[str, Any]
    """A YAML file, or the pipeline itself; its output_dir is the schedule's to set."""
    settings: tuple[str, ...] = Field(default=(), strict=False)
    """Its `key=value`, e.g. `stages.sample.model.path=${sft}`."""

    def prepare(self, task: Task) -> None:
        with_plugins(task.raw, task.step.source)
        task.raw["output_dir"] = str(task.output)
        with contextlib.suppress(ConfigError):  # `problems` says what is wrong
            last = self._pipeline(task).stages[-1]
            task.known.kinds[self.result(task)] = last.gives
            if last.spec.name == "threshold" and last.reads is RowKind.GROUPS:
                task.known.without_advantages.add(self.result(task))

    def result(self, task: Task) -> str:
        return str(self._last(task).shards)

    def problems(self, task: Task) -> Iterator[str]:
        try:
            self._pipeline(task)
        except ConfigError as error:
            yield from error.problems

    def is_scored(self, task: Task) -> bool:
        try:
            stages = self._pipeline(task).stages
        except ConfigError:
            return True  # nobody knows
        into = {each.settings.into for each in stages if each.spec.name == "score"}
        return stages[-1].gives is RowKind.GROUPS and "score" in into

    def is_done(self, task: Task) -> bool:
        return self._last(task).done_record.is_file()

    def command(self, task: Task) -> list[str]:
        return ["prefopt", "data", "build", str(task.file)]

    def found(self, task: Task) -> Found:
        record = self._last(task).done()
        assert record is not None
        numbers: dict[str, Any] = {"rows": record["counts"]["rows_out"]}
        if report := (record.get("report") or {}).get("threshold"):
            numbers |= {"threshold": report["rule"], "of": report["samples"]}
            numbers["their reward"] = report["reward_kept"]["mean"]
        if not self.is_scored(task):
            return Found(None, numbers)
        rows = self._last(task).output(record).rows()
        means = [statistics.fmean(each["score"] for each in row["responses"]) for row in rows]
        if len(means) > 1:
            numbers["standard error"] = statistics.stdev(means) / math.sqrt(len(means))
        return Found(statistics.fmean(means), numbers)

    def _pipeline(self, task: Task) -> Pipeline:
        return parse_pipeline(task.document, task.step.source)

    def _last(self, task: Task) -> StageFolder:
        try:
            return StageFolder(task.output, self._pipeline(task).stages[-1].id)
        except ConfigError:  # only while it is checked
            return StageFolder(task.output, "")


class RecipeStep(StepSettings, LaunchSettings):
    """A recipe of any stage and regime, as of `prefopt train`; `${NAME}` is the policy that comes of it."""

    FILLED: ClassVar = ("trains", "launch", "script")
    HAS_FILE: ClassVar = True

    recipe: PathText | dict[str, Any]
    """A YAML file, or the recipe itself; its output_dir is the schedule's to set."""
    settings: tuple[str, ...] = Field(default=(), strict=False)
    """Its `section.key=value`, e.g. `data.train.0.path=${pairs}`."""
    trains: str | None = None
    """The policy that is trained on, e.g. `${sft}`; default: the recipe's own model. An adapter is trained on, its
    base stays; a full model gets the recipe's adapter, if it has one."""

    def prepare(self, task: Task) -> None:
        raw = with_plugins(task.raw, task.step.source)
        if self.trains is not None:
            set_to_train(raw, final_policy(self.trains), task.known.bases)
        put(raw, "run", output_dir=str(task.output))
        if raw.get("peft") and isinstance(raw.get("model"), dict):
            task.known.bases[self.result(task)] = str(raw["model"].get("path"))

    def result(self, task: Task) -> str:
        return str(task.output / "final")

    def problems(self, task: Task) -> Iterator[str]:
        draft = draft_document(task.document, task.step.source)
        # Not `to_train`: of a step that has begun, the schedule says what changed; its own start says the rest.
        surroundings = Surroundings(assume_cuda=bool(self.launch), to_train=False)
        found, _ = apply_rules(draft, surroundings)
        for problem in (*draft.problems, *found):
            if not any(path in problem for path in task.known.results):  # they are yet to be made
                yield problem
        if not draft.broken:
            yield from self._script_problems(task, draft.recipe)
            yield from _data_problems(task, draft.recipe)

    def is_done(self, task: Task) -> bool:
        return Path(self.result(task)).is_dir()

    def command(self, task: Task) -> list[str]:
        if self.launch:
            return [*shlex.split(self.launch), str(self.script), str(task.file)]
        return ["prefopt", "train", str(task.file)]

    def found(self, task: Task) -> Found:
        metrics: dict[str, Any] = {}
        for row in read_metrics(task.output / METRICS_FILE):
            metrics |= {key: row[key] for key in _METRICS if key in row}
        return Found(None, {key: metrics[key] for key in _METRICS if key in metrics})

    def _script_problems(self, task: Task, recipe: Recipe) -> Iterator[str]:
        """A script that would refuse the recipe would do so after hours of sampling."""
        if self.script is None:
            return
        path, right = Path(self.script), script_of(recipe)
        where = f"{task.step.own.origin(('script',))}script = {self.script!r}"
        others = {*RECIPE_SCRIPTS.values(), "preference", "online_dpo"} - {right}
        if not path.is_file():
            yield f"{where}: no such file (looked in {Path.cwd()})"
        elif path.stem in others:
            yield f"{where}: trains something else; this recipe is launched with recipes/{right}.py"


class EvalStep(StepSettings):
    """An evaluation, as of `prefopt eval`; `${NAME}` is its folder, `${NAME.score}` its first task's headline."""

    FILLED: ClassVar = ("eval", "tasks", "settings")

    eval: str
    """What is measured, e.g. `${sft}`."""
    tasks: str
    """As its `--tasks`."""
    settings: tuple[str, ...] = Field(default=(), strict=False)
    """Its `section.key=value`."""

    def prepare(self, task: Task) -> None:
        task.raw.update(eval=self.eval, tasks=self.tasks, settings=list(self.settings))

    def result(self, task: Task) -> str:
        return str(task.output)

    def is_scored(self, task: Task) -> bool:
        return True

    def is_done(self, task: Task) -> bool:
        return self._results(task).is_file()

    def command(self, task: Task) -> list[str]:
        command = ["prefopt", "eval", self.eval, "--tasks", self.tasks]
        return [*command, "--output", str(task.output), *self.settings]

    def found(self, task: Task) -> Found:
        path = self._results(task)
        advice = "Restore it, or delete it: the same command evaluates again"
        with reading(path, "a results file of `prefopt eval`", advice):
            tasks = load_json(path, {"tasks": dict})["tasks"]
            numbers = {
                f"{name} {each['headline']}": as_object(
                    each["metrics"][each["headline"]], {"value": (int, float, NoneType)}
                )["value"]
                for name, each in tasks.items()
                if each["headline"] in each["metrics"]
            }
        return Found(next(iter(numbers.values()), None), numbers)

    def _results(self, task: Task) -> Path:
        return task.output / "results.json"


KINDS: dict[str, type[StepSettings]] = {
    "pipeline": PipelineStep,
    "recipe": RecipeStep,
    "eval": EvalStep,
}
"""The key that says what a step is -> its class. A new kind is a class here and a line."""


def _data_problems(task: Task, recipe: Recipe) -> Iterator[str]:
    """Rows that a pipeline makes and the recipe cannot train on."""
    if recipe.objective is None:
        return
    needs, of_samples = objective_needs(recipe), reads_samples(recipe)
    origin = task.document.origin(("objective",))
    objective = f"objective.name = {recipe.objective.name!r}"
    for number, source in enumerate(recipe.data.train):
        kind = task.known.kinds.get(source.path)
        holds = f"data.train.{number}.path = {source.path!r}: holds {kind}"
        where = task.document.origin(("data", "train", number, "path"))
        if kind is RowKind.SAMPLES and not of_samples:
            yield (
                f"{origin}{objective}, stage = {recipe.stage!r}: does not train on one response a row, and "
                f"{source.path} holds those. Take filtered_nll (NLL), r_gold or another one on rewards, or end "
                "the pipeline with `pair`"
            )
        elif source.path in task.known.without_advantages and Need.ADVANTAGES in needs:
            yield (
                f"{origin}{objective}: needs advantages, and {source.path} has none: it is made of groups. Put "
                "`advantage` before `threshold`"
            )
        elif kind is RowKind.PAIRS and of_samples:
            yield f"{where}{holds}, and {objective} trains on one response a row; end it with `advantage`"
        elif kind in (RowKind.PROMPTS, RowKind.GROUPS):
            yield f"{where}{holds}, and {objective} trains on pairs or samples; end it with those"
