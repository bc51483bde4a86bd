"""The schedule of `prefopt data rest`: grow, improve above rising thresholds, validate, and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.pipeline import override_numbers
from data_pipelines.schedule.base import BestSettings, Loop, LoopSettings, Schedule, Step
from data_pipelines.schedule.filling import filled, final_policy, put
from data_pipelines.schedule.kinds import PipelineStep, RecipeStep
from data_pipelines.schedule.rest_settings import (
    BELOW_EVERY_REWARD,
    RestSettings,
    ValidationSection,
    filters,
    rest_problems,
)
from data_pipelines.schedule.settings import part, sound_settings
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml


def load_rest(path: Path, overrides: Sequence[str] = ()) -> Schedule:
    """The schedule of a ReST file; ``grow.stages.<id>.key=value`` names a stage by its id.

    Raises: ConfigError with every problem and its line.
    """
    document = read_yaml(path)
    grow = document.raw.get("grow")
    stages = grow.get("stages") if isinstance(grow, dict) else None
    document = apply_overrides(document, override_numbers(overrides, stages, "grow.stages"))
    settings = sound_settings(RestSettings, document, path, rest_problems)
    return _Rest(settings, document, path).schedule()


def validation_pipeline(document: Document, section: ValidationSection, policy: str) -> Document:
    """The pipeline that measures ``policy`` on the held-out prompts.

    Of the grow step's stages, those that ask the policy and those that score; every answer counts.
    """
    raw = _grow_pipeline(document)
    reads, *rest = raw["stages"]
    prompts: dict[str, Any] = {"stage": "prompts", "sources": document.raw["validation"]["sources"]}
    prompts |= {"keep": reads["keep"]} if reads.get("keep") else {}
    prompts |= {"max_prompts": section.max_prompts} if section.max_prompts else {}
    sampled: dict[str, Any] = {"samples_per_seed": section.samples_per_prompt}
    sampled |= {"temperatures": [section.temperature]}
    sampled |= {"drop_identical": False, "drop_unended": False}
    stages = [prompts]
    for each in rest:
        if _asks_policy(each):
            seeds = each.get("seeds") or [0]
            stages.append(
                {**each, **sampled, "seeds": seeds[:1] if isinstance(seeds, list) else seeds}
            )
        elif each.get("stage") == "score":
            stages.append(each)
    # The names of the grow step are of another policy than the one that is measured.
    return Document(filled({**raw, "stages": stages}, {"policy": policy, "grow": 0}, []))


class _Rest:
    """A ReST file as steps and loops; the files and folders of a step are as ``output_dir`` documents them."""

    def __init__(self, settings: RestSettings, document: Document, path: Path) -> None:
        self.settings, self.document, self.path = settings, document, path
        self.first = final_policy(settings.policy)

    def schedule(self) -> Schedule:
        """All data of a grow step first: a threshold that keeps nothing is met before anything is trained."""
        improve, section = self.settings.improve, self.settings.validation
        numbers = range(1, len(improve.thresholds) + 1)
        thresholds = {"threshold": [improve.stage(number) for number in numbers]}
        rates = {"rate": [improve.learning_rate(number) for number in numbers]}
        data = "${output_dir}/grow-${grow}/data/improve-${improve}"
        start: dict[str, Any] = {"train": "${policy}"}
        before: dict[str, Any] = {"train": self.first}
        values = {"policy": "${best.train}"}
        end_of_step = end = None
        if section is not None:
            start["validation.score"] = "${reward}"
            before["validation.score"] = "${validation-0.score}"
            values["reward"] = "${best.validation.score}"
            end = BestSettings(by="validation", min_gain=section.min_gain)
            end_of_step = end.model_copy(update={"patience": section.patience})
        inner = {"start": start, "values": {"data": data}, "best": end_of_step}
        training = [self._training(), *self._validation("validation", "${train}")]
        grow = [
            Loop(LoopSettings(name="improve", each=thresholds), [self._samples()]),
            Loop(LoopSettings(name="improve", each=rates, **inner), training),
        ]
        seed = self.document.raw["grow"].get("seed", 0)
        seeds = [
            seed + n if isinstance(seed, int) else seed for n in range(self.settings.grow.steps)
        ]
        outer = LoopSettings(
            name="grow", each={"seed": seeds}, start=before, values=values, best=end
        )
        first = self._validation("validation-0", self.first, "grow-0/improve-0/")
        return Schedule(
            "ReST",
            self.path,
            Path(self.settings.output_dir),
            [*first, Loop(outer, grow)],
            {"first": self.first},
            list(_grow_problems(self.document)),
        )

    def _samples(self) -> Step:
        raw = _grow_pipeline(self.document)
        raw |= {"seed": "${seed}", "stages": [*raw["stages"], "${threshold}"]}
        document = part(self.document, "grow", raw=raw)
        own = PipelineStep(name="samples", pipeline=raw)
        return Step(own, document, self.path, "grow", file="data.yaml", output="../data")

    def _training(self) -> Step:
        settings = self.settings
        raw = dict(settings.recipe)
        put(raw, "train", learning_rate="${rate}")
        if filters(raw):
            put(raw, "objective", threshold=BELOW_EVERY_REWARD)
        trains = "${first}" if settings.improve.start == "base" else "${previous.train}"
        launch: dict[str, Any] = {"launch": settings.launch, "script": settings.script}
        own = RecipeStep(name="train", recipe=raw, trains=trains, **launch)
        document = part(self.document, "recipe", raw=raw)
        return Step(own, document, self.path, "recipe", self.document, file="recipe.yaml")

    def _validation(self, name: str, policy: str, folder: str = "") -> Iterator[Step]:
        section = self.settings.validation
        if section is not None:
            document = validation_pipeline(self.document, section, policy)
            own = PipelineStep(name=name, pipeline=document.raw)
            file, output = f"{folder}validation.yaml", f"{folder}validation"
            yield Step(own, document, self.path, "validation", file=file, output=output)


def _grow_pipeline(document: Document) -> dict[str, Any]:
    own = {key: value for key, value in document.raw["grow"].items() if key != "steps"}
    return {"seed": 0, **own}


def _grow_problems(document: Document) -> Iterator[str]:
    asking = [n for n, raw in enumerate(document.raw["grow"]["stages"]) if _asks_policy(raw)]
    if not asking:
        yield (
            f"{document.origin(('grow', 'stages'))}grow.stages: no `sample` stage asks ${{policy}}, so later grow "
            "steps would grow the same; set its model: {path: '${policy}'}"
        )
    for number in asking:
        if document.raw["grow"]["stages"][number].get("drop_identical") is not False:
            yield (
                f"{document.origin(('grow', 'stages', number))}grow.stages.{number}.drop_identical = true: drops "
                "prompts whose samples are all the same, and where they are all right they are what is wanted; "
                "set it to false"
            )


def _asks_policy(stage: dict[str, Any]) -> bool:
    model = stage.get("model")
    return (
        stage.get("stage") == "sample"
        and isinstance(model, dict)
        and model.get("path") == "${policy}"
    )
