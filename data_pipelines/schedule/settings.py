"""The file of `prefopt data schedule`; and what the files of all schedules share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from data_pipelines.pipeline import override_numbers
from data_pipelines.schedule.base import (
    NOTHING,
    Loop,
    LoopSettings,
    Schedule,
    Step,
    StepSettings,
    all_steps,
)
from data_pipelines.schedule.kinds import KINDS, LaunchSettings, RecipeStep
from prefopt.errors import ConfigError, suggest
from prefopt.recipe.load import load_settings, validated
from prefopt.recipe.schema import PathText, Section
from prefopt.recipe.yaml_file import Document, KeyPath, apply_overrides, read_yaml

Settings = TypeVar("Settings", bound=Section)


class ScheduleSettings(Section):
    """A schedule: named steps in order, each a command in a process of its own.

    A step is a pipeline, a recipe or an evaluation, by its key; one with `steps` is a loop. In what a step runs
    and in its keys, `${NAME}` is what the step NAME came to.
    """

    output_dir: PathText
    """Each step has its file and its folder here, by its name; in a loop in a folder a turn, `LOOP-1/`, …"""
    values: dict[str, Any] = Field(default_factory=dict)
    """Names of your own for what several steps have, e.g. `policy: runs/sft`."""
    steps: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)]
    """Each has a `name`, and a `pipeline`, a `recipe`, an `eval`, or the `steps` of a loop."""


_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TAKEN = ("output_dir", "previous", "best")


def load_schedule(path: Path, overrides: Sequence[str] = ()) -> Schedule:
    """The schedule of a YAML file; ``steps.NAME.key=value`` names a step by its name.

    Raises: ConfigError with every problem and its line.
    """
    document = read_yaml(path)
    items = document.raw.get("steps")
    named = [each for each in items if isinstance(each, dict)] if isinstance(items, list) else []
    numbers = override_numbers(overrides, [{"id": each.get("name")} for each in named], "steps")
    document = apply_overrides(document, numbers)
    settings = load_settings(ScheduleSettings, document, path)
    problems: list[str] = []
    steps = _bind(settings.steps, ("steps",), document, path, problems)
    schedule = Schedule(path.stem, path, Path(settings.output_dir), steps, settings.values)
    names = sorted([*(each.settings.name for each in all_steps(steps)), *settings.values])
    problems += [
        f"{name}: a second step or value of that name; every one has its own"
        for name, after in pairwise(names)
        if name == after
    ]
    if problems:
        raise ConfigError(problems, source=str(path))
    return schedule


def sound_settings(
    model: type[Settings],
    document: Document,
    path: Path,
    further: Callable[[Settings, Document], Iterator[str]],
) -> Settings:
    """The settings of a file. Raises: ConfigError with every problem and its line, also those of ``further``."""
    settings = load_settings(model, document, path)
    if problems := list(further(settings, document)):
        raise ConfigError(problems, source=str(path))
    return settings


def launch_problems(
    settings: LaunchSettings, document: Document, at: KeyPath = ()
) -> Iterator[str]:
    """``launch`` or ``script`` without the other."""
    if bool(settings.launch) != (settings.script is not None):
        yield (
            f"{document.origin((*at, 'launch'))}launch = {settings.launch!r}, script = {settings.script!r}: are "
            "given together, e.g. `accelerate launch --config_file accelerate_configs/zero3.yaml` and "
            "recipes/dpo.py"
        )


def part(document: Document, *keys: str | int, raw: Mapping[str, Any]) -> Document:
    """A section of a document as one of its own: ``raw``, with the lines that its keys have there."""
    depth = len(keys)
    origins = {at[depth:]: line for at, line in document.origins.items() if at[:depth] == keys}
    return Document(dict(raw), origins)


def _bind(
    items: Sequence[Mapping[str, Any]],
    at: KeyPath,
    document: Document,
    path: Path,
    problems: list[str],
) -> list[Step | Loop]:
    """Sound steps; what is wrong with the others goes to ``problems``."""
    found: list[Step | Loop] = []
    for number, item in enumerate(items):
        here = (*at, number)
        where = f"{document.origin(here)}{'.'.join(map(str, here))}"
        kinds = [kind for kind in (*KINDS, "steps") if kind in item]
        if len(kinds) != 1:
            has = " and ".join(kinds) or "none"
            problems.append(
                f"{where}: is one of {', '.join(KINDS)}, or a loop with steps, and has {has}"
            )
            continue
        name = item.get("name")
        if isinstance(name, str) and (not _NAME.fullmatch(name) or name in _TAKEN):
            problems.append(
                f"{where}.name = {name!r}: takes letters, digits, - and _, and is none of {', '.join(_TAKEN)}"
            )
        model: Any = KINDS.get(kinds[0], LoopSettings)
        reads_file = kinds[0] in KINDS and KINDS[kinds[0]].HAS_FILE
        if reads_file and not isinstance(item[kinds[0]], str | dict):
            problems.append(
                f"{where}.{kinds[0]}: is the path of a YAML file, or what would be in it"
            )
            continue
        read = validated(model, item, document, place=here)
        problems += read.problems
        if (settings := read.value) is None:
            continue
        own = part(document, *here, raw=item)
        if isinstance(settings, LoopSettings):
            steps = _bind(settings.steps, (*here, "steps"), document, path, problems)
            problems += [f"{where}: {each}" for each in _loop_problems(settings, steps)]
            found.append(Loop(settings, steps, own))
        else:
            if isinstance(settings, RecipeStep):
                problems += launch_problems(settings, document, here)
            step = _step(settings, kinds[0], own, path, problems)
            found += [step] if step else []
    return found


def _step(
    settings: StepSettings, kind: str, own: Document, path: Path, problems: list[str]
) -> Step | None:
    """A step with the file that it names, its settings applied."""
    given = own.raw[kind]
    if not settings.HAS_FILE:
        return Step(settings, NOTHING, path, settings.name, own)
    try:
        inline = isinstance(given, dict)
        source = path if inline else Path(given).expanduser()
        document = part(own, kind, raw=given) if inline else read_yaml(source)
        overrides = override_numbers(getattr(settings, "settings", ()), document.raw.get("stages"))
        document = apply_overrides(document, overrides)
        label = f"{settings.name}" if inline else f"{settings.name}: {source}"
        return Step(settings, document, source, label, own)
    except ConfigError as error:
        problems += [
            f"{own.origin((kind,))}{settings.name}: {given}: {each}" for each in error.problems
        ]
        return None


def _loop_problems(settings: LoopSettings, steps: Sequence[Step | Loop]) -> Iterator[str]:
    if (settings.rounds is None) != bool(settings.each):
        yield "a loop has an end: set one of `rounds` (how many turns) and `each` (lists with an entry a turn)"
    if len({*map(len, settings.each.values())}) > 1:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in settings.each.items())
        yield f"each: its lists have an entry a turn, and are of different lengths ({lengths})"
    names = {step.settings.name for step in all_steps(steps)}
    if settings.best is not None and settings.best.by not in names:
        yield f"best.by = {settings.best.by!r}: no step of the loop; {suggest(settings.best.by, names)}"
