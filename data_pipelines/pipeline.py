"""From a YAML file to a pipeline: every problem at once, with its line, before anything is read or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from data_pipelines.base import StageSettings
from data_pipelines.executors import AnyExecutor, LocalExecutor
from data_pipelines.registry import StageSpec, get_stage, stage_names
from data_pipelines.rows import RowKind
from prefopt.errors import ConfigError, suggest
from prefopt.recipe.load import plugin_problems, validated
from prefopt.recipe.plugin_code import why_unknown
from prefopt.recipe.schema import PathText, Section
from prefopt.recipe.yaml_file import Document, KeyPath, apply_overrides, read_yaml

_OWN = frozenset({"stage", "id"})
"""Keys of a stage that say which it is; the others are its settings."""


class PipelineSettings(Section):
    """A pipeline: where it writes, and its stages in order."""

    output_dir: PathText
    """A folder a stage is made in here, with `manifest/` beside them."""
    seed: int = 0
    """Of sampling, drawing and shuffling."""
    shard_rows: PositiveInt = 1000
    """Rows of a shard: what a worker's death costs at most, and what one worker takes at a time."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the shards. Parquet has null where JSON lines have no key; such keys are left out again when read."""
    executor: AnyExecutor = LocalExecutor()
    """Who makes the shards; changes no row."""
    plugins: tuple[str, ...] = Field(default=(), strict=False)
    """Python files (relative to the pipeline) imported first: where your own stages, signals and rules live."""
    stages: tuple[dict[str, Any], ...] = Field(strict=False, min_length=1)
    """Each has a `stage`, its keys, and an `id` where one stage comes twice. `prefopt data stages` lists them."""


@dataclass(frozen=True)
class BoundStage:
    """One stage of a pipeline, with valid settings."""

    id: str
    spec: StageSpec
    settings: Any
    reads: RowKind | None
    gives: RowKind


@dataclass(frozen=True)
class Pipeline:
    """A pipeline whose settings are sound."""

    settings: PipelineSettings
    stages: tuple[BoundStage, ...]
    source: str
    """The YAML file, for messages."""

    @property
    def directory(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def plugins(self) -> tuple[Path, ...]:
        """The files of `plugins`, absolute."""
        folder = Path(self.source).parent
        return tuple((folder / plugin).resolve() for plugin in self.settings.plugins)

    def index(self, id_: str) -> int:
        """The place of a stage. Raises: ConfigError naming the nearest."""
        ids = [each.id for each in self.stages]
        if id_ not in ids:
            raise ConfigError(f"stage {id_!r}: not in {self.source}; {suggest(id_, ids)}")
        return ids.index(id_)


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a YAML file, or of a preset by its name, with ``key=value`` overrides.

    ``stages.<id>.key=value`` names a stage by its id.
    Raises: ConfigError listing every problem with its line.
    """
    path = preset_file(path)
    document = read_yaml(path)
    return parse_pipeline(
        apply_overrides(document, override_numbers(overrides, document.raw.get("stages"))), path
    )


def parse_pipeline(document: Document, path: Path) -> Pipeline:
    """As `load_pipeline`, of a file that has been read; plugins are relative to ``path``."""
    found = validated(PipelineSettings, document.raw, document)
    settings, problems = found.value, [*document.problems, *found.problems]
    problems += plugin_problems(document, path)
    items = document.raw.get("stages")
    stages = _bind(items if isinstance(items, list) else [], document, problems)
    if problems or settings is None:
        raise ConfigError(problems, source=str(path))
    return Pipeline(settings, tuple(stages), str(path))


def presets() -> dict[str, Path]:
    """The shipped pipelines by name: papers' recipes for data."""
    folder = Path(__file__).with_name("presets")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_file(path: Path) -> Path:
    """The file of a preset, where ``path`` is one's name and no file; else ``path``."""
    return path if path.exists() else presets().get(str(path), path)


def override_numbers(overrides: Iterable[str], stages: Any, section: str = "stages") -> list[str]:
    """Overrides with ``stages.<id>.`` written as ``stages.<number>.``; ``section`` is where ``stages`` stand."""
    items = stages if isinstance(stages, list) else []
    numbers = {id_: number for number, id_ in enumerate(_ids(items))}
    result = []
    for override in overrides:
        head, key = override[: len(section) + 1], override[len(section) + 1 :]
        name, dot, tail = key.partition(".")
        if head == f"{section}." and dot and name in numbers:
            override = f"{section}.{numbers[name]}.{tail}"
        result.append(override)
    return result


def _ids(items: Sequence[Any]) -> list[str]:
    """The id of each stage: its own, else its name, with a number from the second of that name on."""
    found: list[str] = []
    for item in items:
        section = item if isinstance(item, dict) else {}
        name = str(section.get("id") or section.get("stage"))
        numbered = (f"{name}-{number}" for number in range(2, len(items) + 2))
        taken = "id" not in section and name in found
        found.append(next(each for each in numbered if each not in found) if taken else name)
    return found


def _bind(items: Sequence[Any], document: Document, problems: list[str]) -> list[BoundStage]:
    """Sound stages; what is wrong with the others goes to ``problems``."""
    found: list[BoundStage] = []
    kind: RowKind | None = None
    ids = _ids(items)
    for number, (item, id_) in enumerate(zip(items, ids, strict=True)):
        path: KeyPath = ("stages", number)
        where = f"{document.origin(path)}stages.{number}"
        if not isinstance(item, dict):
            continue  # the schema has said so
        if ids.index(id_) != number:
            problems.append(f"{where}: a second stage is called {id_!r}; give it an id of its own")
        if not _is_folder_name(id_):
            problems.append(
                f"{where}.id = {id_!r}: is a folder's name: letters, digits, - and _ only"
            )
        name = item.get("stage")
        if not isinstance(name, str) or name not in stage_names():
            problems.append(
                f"{where}.stage = {name!r}: unknown; {suggest(str(name), stage_names())}{why_unknown()}"
            )
            return found  # what comes after cannot be judged
        spec = get_stage(name)
        problems += _order_problems(spec, kind, number, where)
        keys = {key: value for key, value in item.items() if key not in _OWN}
        bound = validated(spec.settings, keys, document, place=path, also=_OWN)
        settings = bound.value
        problems += bound.problems
        if settings is None:
            kind = None if spec.gives in ("same", "either") else RowKind(spec.gives)
            if kind is None:
                return found
            continue
        problems += settings.problems(kind, document, path)
        gives = _gives(spec, settings, kind)
        problems += _field_problems(found, settings, id_, where)
        found.append(BoundStage(id_, spec, settings, kind if spec.reads else None, gives))
        kind = gives
    return found


def _is_folder_name(text: str) -> bool:
    return text.replace("-", "").replace("_", "").isalnum() and text not in (
        "manifest",
        "logs",
    )


def _order_problems(spec: StageSpec, kind: RowKind | None, number: int, where: str) -> list[str]:
    if not spec.reads and number > 0:
        return [f"{where}.stage = {spec.name!r}: reads files, so it comes first"]
    if spec.reads and number == 0:
        first = sorted(name for name in stage_names() if not get_stage(name).reads)
        return [f"{where}.stage = {spec.name!r}: needs rows; start with one of {', '.join(first)}"]
    if kind is not None and spec.reads and kind not in spec.reads:
        takes = " or ".join(sorted(spec.reads))
        return [f"{where}.stage = {spec.name!r}: takes {takes}, and the stage before gives {kind}"]
    return []


def _gives(spec: StageSpec, settings: Any, kind: RowKind | None) -> RowKind:
    if spec.gives == "either":
        return settings.gives_kind
    if spec.gives == "same":
        return kind or RowKind.PROMPTS
    return RowKind(spec.gives)


def _field_problems(
    before: Sequence[BoundStage], settings: StageSettings, id_: str, where: str
) -> list[str]:
    """Columns a stage reads that no stage makes and the first does not keep: known before a model loads."""
    kept = getattr(before[0].settings, "keep", None) if before else None
    if kept is None:
        return []
    made = {name for stage in before for name in stage.settings.gives_fields()}
    known = {name.split(".")[0] for name in kept} | made
    missing = [name for name in settings.needs_fields() if name.split(".")[0] not in known]
    return [
        f"{where}: stage {id_!r} reads the column {name!r}, and {before[0].id!r} does not keep it; add it to "
        f"stages.0.keep"
        for name in missing
    ]
