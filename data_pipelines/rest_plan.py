"""What each step of a ReST schedule runs: its pipeline, its recipe, its validation; and whether they can work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.filling import filled, set_to_train, with_plugins
from data_pipelines.pipeline import Pipeline, parse_pipeline
from data_pipelines.rest_settings import RestFile, part
from data_pipelines.rows import RowKind
from data_pipelines.steps import Files
from prefopt.cli import RECIPE_SCRIPTS, script_of
from prefopt.errors import ConfigError
from prefopt.recipe.checks.rules import Surroundings, apply_rules
from prefopt.recipe.checks.settings import objective_needs, reads_samples
from prefopt.recipe.load import draft_document
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import Recipe
from prefopt.recipe.yaml_file import Document


@dataclass(frozen=True)
class ImproveStep:
    """One improve step with every placeholder filled in."""

    grow: int
    number: int
    folder: Path
    start: str
    """The policy whose weights it trains."""
    data: Path
    """Folder of the grow step's pipeline."""
    pipeline: dict[str, Any]
    """The grow step's stages and this step's threshold: what is made already is not made again."""
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        return f"grow {self.grow}, improve {self.number}"

    @property
    def stage(self) -> str:
        """Id of the stage that keeps what is above the threshold."""
        return f"improve-{self.number}"

    @property
    def run(self) -> Path:
        return self.folder / "train"

    @property
    def final(self) -> Path:
        """The policy that comes of it."""
        return self.run / "final"

    @property
    def files(self) -> Files:
        return [
            (self.folder / "data.yaml", self.pipeline),
            (self.folder / "recipe.yaml", self.recipe),
        ]


def plan_grow(file: RestFile, grow: int, policy: str, first: str) -> list[ImproveStep]:
    """The improve steps of one grow step, in order.

    Args:
        file: the schedule.
        grow: number of the grow step, from 1.
        policy: what it samples from.
        first: the policy of the schedule.

    Raises: ConfigError for an unknown placeholder.
    """
    settings = file.settings
    found: list[ImproveStep] = []
    for number in range(1, len(settings.improve.thresholds) + 1):
        start = first if settings.improve.start == "base" else policy
        if settings.improve.start == "previous" and found:
            start = str(found[-1].final)
        found.append(_step(file, grow, number, policy, first, start))
    return found


def _step(
    file: RestFile, grow: int, number: int, policy: str, first: str, start: str
) -> ImproveStep:
    settings = file.settings
    root = Path(settings.output_dir) / f"grow-{grow}"
    folder, data = root / f"improve-{number}", root / "data"
    threshold = settings.improve.stage(number)
    values: dict[str, Any] = {"policy": policy, "first": first, "grow": grow}
    pipeline = filled(grow_pipeline(file, grow), values, str(file.path))
    pipeline["stages"] = [*pipeline["stages"], threshold]
    values |= {"improve": number, "data": str(data / threshold["id"])}
    recipe = with_plugins(_copied(settings.recipe), file.path)
    recipe = set_to_train(recipe, start, first, folder / "train")
    recipe["train"] = {
        **(recipe.get("train") or {}),
        "learning_rate": settings.improve.learning_rate(number),
    }
    recipe = filled(recipe, values, str(file.path))
    return ImproveStep(grow, number, folder, start, data, pipeline, recipe)


def grow_pipeline(file: RestFile, grow: int) -> dict[str, Any]:
    """The pipeline of a grow step with its placeholders, without a threshold."""
    own = {key: value for key, value in file.document.raw["grow"].items() if key != "steps"}
    raw = with_plugins(own, file.path)
    raw["output_dir"] = str(Path(file.settings.output_dir) / f"grow-{grow}" / "data")
    seed = raw.get("seed", 0)
    if isinstance(seed, int):  # of anything else the schema says what is wrong
        raw["seed"] = seed + grow - 1
    return raw


def validation_pipeline(file: RestFile, policy: str, first: str, folder: Path) -> dict[str, Any]:
    """The pipeline that measures ``policy`` on the held-out prompts; ``folder`` gets ``validation/``.

    Of the grow step's stages, those that ask the policy and those that score; every answer counts.
    """
    section = file.settings.validation
    assert section is not None
    raw = {**grow_pipeline(file, 1), "output_dir": str(folder / "validation")}
    sources = file.document.raw["validation"]["sources"]
    reads, *rest = file.document.raw["grow"]["stages"]
    prompts: dict[str, Any] = {"stage": "prompts", "sources": sources}
    prompts |= {"keep": reads["keep"]} if reads.get("keep") else {}
    prompts |= {"max_prompts": section.max_prompts} if section.max_prompts else {}
    sampled: dict[str, Any] = {"samples_per_seed": section.samples_per_prompt}
    sampled |= {"temperatures": [section.temperature]}
    sampled |= {"drop_identical": False, "drop_unended": False}
    stages = [prompts]
    for each in rest:
        if _asks_policy(each):
            stages.append({**each, **sampled, "seeds": list(each.get("seeds") or [0])[:1]})
        elif each.get("stage") == "score":
            stages.append(each)
    raw["stages"] = stages
    return filled(raw, {"policy": policy, "first": first, "grow": 0}, str(file.path))


def check_rest(file: RestFile, first: str) -> None:
    """Raises ConfigError with all that can be known to be wrong before the first step: pipeline and recipe."""
    problems: list[str] = []
    try:
        (step, *_) = plan_grow(file, 1, first, first)
    except ConfigError as error:
        raise ConfigError(error.problems, source=str(file.path)) from error
    stages = step.pipeline["stages"][:-1]
    document = part(file.document, "grow", raw={**step.pipeline, "stages": stages})
    gives = None
    try:
        pipeline = parse_pipeline(document, file.path)
        problems += _grow_problems(pipeline, file)
        gives = pipeline.stages[-1].gives
        if file.settings.validation is not None:
            parse_pipeline(Document(validation_pipeline(file, first, first, Path())), file.path)
    except ConfigError as error:
        problems += [f"grow: {each}" for each in error.problems]
    problems += [f"recipe: {each}" for each in _recipe_problems(file, step, gives)]
    if problems:
        raise ConfigError(problems, source=str(file.path))


def _grow_problems(pipeline: Pipeline, file: RestFile) -> Iterator[str]:
    last = len(pipeline.stages) - 1
    gives = pipeline.stages[-1].gives
    document = file.document
    if gives not in (RowKind.GROUPS, RowKind.SAMPLES):
        yield (
            f"{document.origin(('grow', 'stages', last))}grow.stages.{last}: gives {gives}, and thresholds are "
            "over scored groups or samples; end with `score`, or with `advantage`"
        )
    asking = [n for n, raw in enumerate(document.raw["grow"]["stages"]) if _asks_policy(raw)]
    if not asking:
        yield (
            f"{document.origin(('grow', 'stages'))}grow.stages: no `sample` stage asks ${{policy}}, so later grow "
            "steps would grow the same; set its model: {path: '${policy}'}"
        )
    for number in asking:
        if pipeline.stages[number].settings.drop_identical:
            yield (
                f"{document.origin(('grow', 'stages', number))}grow.stages.{number}.drop_identical = true: drops "
                "prompts whose samples are all the same, and where they are all right they are what is wanted; "
                "set it to false"
            )
    scores = [each for each in pipeline.stages if each.spec.name == "score"]
    if file.settings.validation is not None and "score" not in {s.settings.into for s in scores}:
        yield (
            f"{document.origin(('validation',))}validation: grow.stages has no `score` stage that writes "
            "`score`, which held-out answers would be scored by"
        )


def _recipe_problems(file: RestFile, step: ImproveStep, gives: RowKind | None) -> list[str]:
    """Of the first step's recipe. What it says of files below output_dir is left out: they are yet to be made."""
    draft = draft_document(part(file.document, "recipe", raw=step.recipe), file.path)
    found, _ = apply_rules(draft, Surroundings(assume_cuda=bool(file.settings.launch)))
    problems = [*draft.problems, *found]
    if not draft.broken:
        problems += _script_problems(file, script_of(draft.recipe))
        problems += _objective_problems(file, draft.recipe, gives)
    return [each for each in problems if file.settings.output_dir not in each]


def _objective_problems(file: RestFile, recipe: Recipe, gives: RowKind | None) -> Iterator[str]:
    """What is trained on is one response a row, with its reward."""
    where = file.document.origin(("recipe", "objective"))
    if recipe.stage == "sft":
        return
    name = recipe.objective.name if recipe.objective else None
    if not reads_samples(recipe):
        yield (
            f"{where}objective.name = {name!r}, stage = {recipe.stage!r}: does not train on one response a row, "
            "which is what is left above a threshold. Take filtered_nll (NLL), r_gold or another one on rewards"
        )
    elif Need.ADVANTAGES in objective_needs(recipe) and gives is RowKind.GROUPS:
        yield (
            f"{where}objective.name = {name!r}: needs advantages, and grow.stages end with groups, which have "
            "none; end them with `advantage`"
        )


def _script_problems(file: RestFile, right: str) -> Iterator[str]:
    """A script that would refuse the recipe would do so after hours of sampling."""
    script = file.settings.script
    if script is None:
        return
    where = f"{file.document.origin(('script',))}script = {script!r}"
    path = Path(script)
    if not path.is_file():
        yield f"{where}: no such file (looked in {Path.cwd()})"
    elif path.stem != right and path.stem in {*RECIPE_SCRIPTS.values(), "preference", "online_dpo"}:
        yield f"{where}: trains something else; this recipe is launched with recipes/{right}.py"


def _asks_policy(stage: dict[str, Any]) -> bool:
    model = stage.get("model")
    return (
        stage.get("stage") == "sample"
        and isinstance(model, dict)
        and model.get("path") == "${policy}"
    )


def _copied(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
