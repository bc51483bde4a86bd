"""The file of `prefopt data round`: rounds of sampling from the newest policy and training on what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from data_pipelines.filling import filled, final_policy, set_to_train, with_plugins
from data_pipelines.pipeline import Pipeline, parse_pipeline
from data_pipelines.rows import RowKind
from data_pipelines.steps import Files
from prefopt.errors import ConfigError
from prefopt.recipe.load import draft_document, load_settings
from prefopt.recipe.schema import PathText, Section
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml


class RoundEval(Section):
    """An evaluation after each round: `prefopt eval`."""

    tasks: str
    """As its `--tasks`."""
    settings: tuple[str, ...] = Field(default=(), strict=False)
    """Its `section.key=value`."""


class RoundsSettings(Section):
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
    launch: str = ""
    """What training is started with, e.g. `accelerate launch --config_file accelerate_configs/zero3.yaml`;
    default: this machine, one process."""
    script: PathText | None = None
    """Script that is launched, e.g. recipes/dpo.py; needed with `launch`."""
    eval: RoundEval | None = None
    """Leave out to evaluate nothing."""


@dataclass(frozen=True)
class Round:
    """One round with every placeholder filled in."""

    number: int
    folder: Path
    policy: str
    """What it samples from."""
    pipelines: tuple[tuple[str, dict[str, Any]], ...]
    """Name and YAML of each."""
    recipe: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "train"

    @property
    def final(self) -> Path:
        """The policy that comes of it."""
        return self.run / "final"

    @property
    def files(self) -> Files:
        """Pipelines and recipe, as the round's own folder has them."""
        named = [*self.pipelines, ("recipe", self.recipe)]
        return [(self.file(name), raw) for name, raw in named]

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"


def load_rounds(path: Path, overrides: Sequence[str] = ()) -> RoundsSettings:
    """The settings of a rounds file. Raises: ConfigError with every problem and its line."""
    document = apply_overrides(read_yaml(path), overrides)
    settings = load_settings(RoundsSettings, document, path)
    if bool(settings.launch) != (settings.script is not None):
        raise ConfigError(
            f"{document.origin(('launch',))}launch = {settings.launch!r}, script = {settings.script!r}: are given "
            "together, e.g. `accelerate launch --config_file accelerate_configs/zero3.yaml` and recipes/dpo.py",
            source=str(path),
        )
    return settings


def plan_rounds(settings: RoundsSettings) -> list[Round]:
    """Every round with its paths, all checked as far as can be before the first one ran.

    Raises: ConfigError, with the file it comes from, for a pipeline or recipe that cannot work.
    """
    root = Path(settings.output_dir)
    policies = [final_policy(settings.policy)]
    rounds: list[Round] = []
    for number in range(1, settings.num_rounds + 1):
        each = _round(settings, number, root / f"round-{number}", policies)
        _check(settings, each)
        rounds.append(each)
        policies.append(str(each.final))
    return rounds


def _round(settings: RoundsSettings, number: int, folder: Path, policies: Sequence[str]) -> Round:
    files = settings.pipelines
    if number == 1 and settings.first_pipelines:
        files = settings.first_pipelines
    values: dict[str, Any] = {
        "policy": policies[-1],
        "previous": policies[max(0, len(policies) - 2)],
        "first": policies[0],
        "round": number,
    }
    pipelines = []
    for file in map(Path, files):
        raw = dict(read_yaml(file).raw)
        raw["output_dir"] = str(folder / "data" / file.stem)
        pipeline = filled(with_plugins(raw, file), values, str(file))
        pipelines.append((file.stem, pipeline))
        last = _bound(pipeline, file).stages[-1]
        values[f"data.{file.stem}"] = values["data"] = str(folder / "data" / file.stem / last.id)
    recipe = _recipe(settings, folder, policies, values)
    return Round(number, folder, policies[-1], tuple(pipelines), recipe)


def _recipe(
    settings: RoundsSettings, folder: Path, policies: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe, set to train the round's policy: an adapter is trained on, a full model gets a new one."""
    file = Path(settings.recipe)
    raw = dict(read_yaml(file).raw)
    if "${data}" not in json.dumps(raw.get("data")):
        raise ConfigError(
            "data: names no ${data}, so the rounds' pairs would not be trained on; write "
            "data: {train: [{path: '${data}'}]}",
            source=str(file),
        )
    trained = policies[-1] if settings.trains == "newest" else policies[0]
    raw = set_to_train(raw, trained, policies[0], folder / "train")
    return filled(with_plugins(raw, file), values, str(file))


def _check(settings: RoundsSettings, each: Round) -> None:
    """Structure of pipelines and recipe; files of a policy that is yet to be trained are not there to check."""
    name, raw = each.pipelines[-1]
    gives = _bound(raw, Path(name)).stages[-1].gives
    if gives is not RowKind.PAIRS:
        raise ConfigError(
            f"pipelines: {name} ends with {gives}, and a round trains on pairs; end with `pair`"
        )
    draft = draft_document(Document(each.recipe), Path(settings.recipe))
    if draft.problems:
        raise ConfigError(draft.problems, source=settings.recipe)


def _bound(raw: dict[str, Any], file: Path) -> Pipeline:
    return parse_pipeline(Document(raw), file)
