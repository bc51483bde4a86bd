"""What earlier evaluations left: their ``results.json`` and a line an example, read for comparing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from eval.base import Metric
from eval.provenance import task_folder
from prefopt.errors import ConfigError, DataError
from prefopt.storage.reading import (
    SHAPE_ERRORS,
    UnreadableError,
    load_json,
    parse_json,
    reading,
)

RESULTS_FILE = "results.json"
EXAMPLES_FILE = "examples.jsonl"
_STEP = re.compile(r"(?:step|checkpoint)-(\d+)")

Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class TaskResult:
    """One task's entry of ``results.json``."""

    version: str
    kind: str
    headline: str
    direction: Direction
    metrics: Mapping[str, Metric]
    """A value that there is not is NaN."""
    counts: Mapping[str, int]
    """Of the summary and of the answers."""
    groups: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    made: Mapping[str, Any]
    """The rest of the entry, JSON: hashes, decoding, judge, template, options, usage."""


@dataclass(frozen=True)
class Output:
    """One evaluation's directory."""

    name: str
    """The shortest end of its path that no other has."""
    path: Path
    head: Mapping[str, Any]
    """``results.json`` without its tasks."""
    tasks: Mapping[str, TaskResult]
    run: str
    """Of a checkpoint: the directory that holds it and its siblings; else its own."""
    step: int | None


@dataclass(frozen=True)
class Side:
    """What one model did with one example."""

    prompt: str
    answer: str
    values: Mapping[str, Any]
    details: Mapping[str, Any]
    problem: str | None


@dataclass(frozen=True)
class ExampleFile:
    """The values of ``examples.jsonl``; its texts stay on disk until `read` is asked for some."""

    path: Path
    value_name: str | None
    """Of the first entry of the rows' values; None if no row has any."""
    values: dict[str, float | None] = field(repr=False)
    """By key, in file order."""
    offsets: dict[str, int] = field(repr=False)
    """Where each line starts, in bytes."""

    def read(self, keys: Iterable[str]) -> dict[str, Side]:
        """The whole rows of these keys."""
        found = {}
        with self.path.open("rb") as file:
            for key in keys:
                file.seek(self.offsets[key])
                row = json.loads(file.readline())
                found[key] = Side(
                    prompt=str(row.get("prompt") or ""),
                    answer=str(row.get("answer") or ""),
                    values=row["values"],
                    details=row.get("details") or {},
                    problem=row.get("problem"),
                )
        return found


def open_outputs(paths: Sequence[Path]) -> tuple[list[Output], list[str]]:
    """The evaluations at ``paths``, and what a reader must know about what is left out.

    A directory of evaluations (``--checkpoints``) stands for those in it, by step and then name.
    Raises: ConfigError for fewer than two, or one given twice; DataError for what holds no results, naming it.
    """
    notes: list[str] = []
    directories = [each for path in paths for each in _expanded(Path(path), notes)]
    resolved = [directory.resolve() for directory in directories]
    twice = sorted({str(path) for path in resolved if resolved.count(path) > 1})
    if twice:
        raise ConfigError([f"{path}: given twice; a result compares with others" for path in twice])
    if len(resolved) < 2:
        raise ConfigError(
            f"{', '.join(map(str, paths)) or 'no results'}: a comparison takes at least two results; name "
            "another output directory of `prefopt eval`"
        )
    names = _shortest_names(resolved)
    return [_open(name, path) for name, path in zip(names, directories, strict=True)], notes


def open_examples(output: Output, task: str) -> ExampleFile:
    """The examples of one task.

    Raises: DataError naming file and line: missing, not JSON, no key, a key twice, a value that is no number.
    """
    path = output.path / task_folder(task) / EXAMPLES_FILE
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, although {output.path / RESULTS_FILE} has {task}. Copy the whole output "
            "directory, or evaluate again"
        )
    values: dict[str, float | None] = {}
    offsets: dict[str, int] = {}
    lines: dict[str, int] = {}
    value_name: str | None = None
    for number, offset, row in _rows(path):
        key = row["key"]
        if key in values:
            raise DataError(
                f"{path}:{number}: key {key!r} a second time; the first is on line {lines[key]}"
            )
        value_name = value_name or next(iter(row["values"]), None)
        values[key] = _value(row["values"].get(value_name), f"{path}:{number}: {value_name}")
        offsets[key], lines[key] = offset, number
    return ExampleFile(path, value_name, values, offsets)


def measured_by(output: Output, task: str) -> str | None:
    """What a task's scores are, where it has several (``implicit_reward``, ``mean_logp``, …), by its rows.

    An option left at `auto` does not say it: that goes by what the model is.
    """
    path = output.path / task_folder(task) / EXAMPLES_FILE
    if not path.is_file():  # `open_examples` says so
        return None
    found = ((row.get("details") or {}).get("by") for _, _, row in _rows(path))
    return next((str(by) for by in found if by is not None), None)


def _rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """``(line number, offset in bytes, row)``; a row has its key, values and problem."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line)
            except UnreadableError as error:
                raise DataError(f"{path}:{number}: {error}. Evaluate again") from error
            if not (
                isinstance(row, dict)
                and isinstance(row.get("key"), str)
                and isinstance(row.get("values"), dict)
                and isinstance(row.setdefault("problem", None), str | None)
            ):
                raise DataError(
                    f'{path}:{number}: must be {{"key": text, "values": {{name: number}}, …}}'
                )
            yield number, offset, row
            offset += len(line)


def _value(value: Any, where: str) -> float | None:
    """NaN, which JSON of other tools may hold, is no value either."""
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise DataError(f"{where} = {value!r}: must be a number or null")
    return float(value) if math.isfinite(value) else None


def _expanded(path: Path, notes: list[str]) -> list[Path]:
    if path.name == RESULTS_FILE and path.is_file():
        return [path.parent]
    if (path / RESULTS_FILE).is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; name an output directory of `prefopt eval`")
    children = [child for child in path.iterdir() if child.is_dir()]
    found = [child for child in children if (child / RESULTS_FILE).is_file()]
    if not found:
        raise DataError(
            f"{path}: holds no {RESULTS_FILE}, nor directories that do. An evaluation that was killed goes "
            "on when the same command runs again"
        )
    unfinished = [each for each in children if each not in found and _STEP.fullmatch(each.name)]
    notes += [
        f"{each}: left out: it holds no {RESULTS_FILE}" for each in sorted(unfinished, key=_order)
    ]
    return sorted(found, key=_order)


def _order(path: Path) -> tuple[float, str]:
    """Steps as numbers, before what has none."""
    match = _STEP.fullmatch(path.name)
    return (int(match[1]) if match else math.inf, path.name)


def _shortest_names(paths: Sequence[Path]) -> list[str]:
    """The ends of distinct absolute paths, each as short as it can be without being another's."""

    def end(path: Path, parts: int) -> str:
        return "/".join(path.parts[-parts:])

    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = range(1, len(path.parts) + 1)
        names.append(
            next(
                (end(path, n) for n in lengths if end(path, n) not in {end(o, n) for o in others}),
                str(path),
            )
        )
    return names


def _open(name: str, directory: Path) -> Output:
    path = directory / RESULTS_FILE
    with reading(path, "a results file of `prefopt eval`", "Evaluate again"):
        results = load_json(path, {"tasks": dict})
    tasks = {task: _task_result(entry, path, task) for task, entry in results["tasks"].items()}
    head = {key: value for key, value in results.items() if key != "tasks"}
    match = _STEP.fullmatch(directory.resolve().name)
    run = directory.resolve().parent if match else directory.resolve()
    return Output(name, directory, head, tasks, str(run), int(match[1]) if match else None)


def _task_result(entry: Any, path: Path, task: str) -> TaskResult:
    named = ("version", "kind", "headline", "direction", "metrics", "counts", "groups", "notes")
    try:
        result = TaskResult(
            version=str(entry["version"]),
            kind=str(entry["kind"]),
            headline=str(entry["headline"]),
            direction=_direction(entry["direction"]),
            metrics={name: _metric(metric) for name, metric in entry["metrics"].items()},
            counts={**entry["counts"], **(entry.get("answers") or {})},
            groups=entry["groups"],
            notes=tuple(entry["notes"]),
            made={key: value for key, value in entry.items() if key not in named},
        )
    except SHAPE_ERRORS as error:
        raise DataError(
            f"{path}: tasks.{task} is not what `prefopt eval` writes ({error!r}). Evaluate again with this "
            "version"
        ) from error
    if result.headline not in result.metrics:
        raise DataError(
            f"{path}: tasks.{task}: its headline {result.headline!r} is not in its metrics"
        )
    return result


def _direction(value: Any) -> Direction:
    """Raises: ValueError for another word."""
    return get_args(Direction)[get_args(Direction).index(value)]


def _metric(metric: Mapping[str, Any]) -> Metric:
    value, stderr, interval = metric["value"], metric.get("stderr"), metric.get("interval")
    return Metric(
        math.nan if value is None else float(value),
        None if stderr is None else float(stderr),
        (float(interval[0]), float(interval[1])) if interval and None not in interval else None,
    )
