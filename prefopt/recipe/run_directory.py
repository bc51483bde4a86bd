"""What a run directory holds, and whether a recipe may go on there. No torch.

A directory is of one run: of the settings in its run.json that decide what is computed. Others are refused,
setting by setting, unless `train.accept_changes` says to go on with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.recipe.explain import show_value
from prefopt.recipe.schema import Recipe
from prefopt.recipe.walk import Schema, default_at, recorded
from prefopt.recipe.yaml_file import KeyPath
from prefopt.shown import without_credentials
from prefopt.storage.code import code_hash
from prefopt.storage.run_files import (
    CHECKPOINTS,
    RUN_FILE,
    STATE_FILE,
    complete_checkpoints,
    read_run,
)

FINAL = "final"
_LENGTH = ("train.num_epochs", "train.max_steps")
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A setting, or a fact, that is another one than in the run's record."""

    key: str
    was: Any
    now: Any

    @property
    def was_text(self) -> str:
        return _short(self.was)

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.was)} → {_short(self.now)}"

    def as_json(self) -> dict[str, Any]:
        """For a record; null where it was not set."""
        was, now = (None if each is _ABSENT else each for each in (self.was, self.now))
        return {"key": self.key, "was": was, "now": now}


@dataclass(frozen=True)
class Used:
    """What a start with this recipe would find in its directory."""

    run_dir: Path
    checkpoint: Path | None
    """What it would go on from."""
    record: dict[str, Any] | None
    """Of the run that wrote the checkpoint, or ``final/``; None where run.json is gone."""
    changes: tuple[Change, ...]
    """Settings that decide what is computed."""
    is_finished: bool
    """The run of these very settings has ended, and its ``final/`` is there."""

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        if self.record is not None and (finished := self.record.get("finished")):
            return f"finished after {finished['step']} steps"
        return f"at {self.checkpoint.name}" if self.checkpoint else "ended"


def used_directory(recipe: Recipe) -> Used | None:
    """What there is to go on from, or to write over; None for a directory that holds no weights.

    Raises: ConfigError as `find_checkpoint`; DataError for a record that cannot be read.
    """
    run_dir = Path(recipe.run.output_dir)
    checkpoint = find_checkpoint(run_dir, recipe.train.resume)
    has_final = (run_dir / FINAL).is_dir()
    if checkpoint is None and not has_final:
        return None
    # A checkpoint of another directory brings its own record.
    home = run_dir if checkpoint is None else checkpoint.resolve().parent.parent
    record = read_run(home) if (home / RUN_FILE).is_file() else None
    changes = () if record is None else tuple(changed_settings(record, recipe))
    finished = (
        record is not None
        and home.resolve() == run_dir.resolve()
        and bool(record.get("finished"))
        and has_final
        and not any(changed_settings(record, recipe, strict=True))
    )
    return Used(run_dir, checkpoint, record, changes, finished)


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``train.resume`` asks for, or None to start afresh.

    Raises: ConfigError if a named one is not complete, or ``never`` meets what another run has made.
    """
    found = list(complete_checkpoints(run_dir / CHECKPOINTS).values())
    if not found and any((run_dir / CHECKPOINTS).glob("checkpoint-*")):
        raise ConfigError(
            f"run.output_dir = {run_dir}: holds checkpoints of an older version, whose SFT and reward models TRL "
            "trained (checkpoint-N): this one cannot go on from them. Use another run.output_dir"
        )
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found or (run_dir / FINAL).is_dir():
            holds = f"checkpoints up to {found[-1].name}" if found else f"{FINAL}/"
            raise ConfigError(
                f"train.resume = never: {run_dir} holds a run with {holds}; use "
                "another run.output_dir, delete it, or go on with train.resume = auto"
            )
        return None
    path = Path(resume).expanduser()
    if not (path / STATE_FILE).is_file():
        raise ConfigError(
            f"train.resume = {resume}: not a complete checkpoint (no {STATE_FILE}); give a "
            "directory such as runs/x/checkpoints/step-100, or auto"
        )
    if found and found[-1].resolve() != path.resolve():
        # Going on from here would leave two histories under one name, and `auto` would pick the older.
        raise ConfigError(
            f"train.resume = {resume}: {run_dir} holds other checkpoints, up to {found[-1].name}, that this "
            "run would mix with its own. Use train.resume = auto to go on from that one, another "
            "run.output_dir to branch off, or delete the checkpoints after the one you want"
        )
    return path


def changed_settings(
    record: Mapping[str, Any], recipe: Recipe, *, strict: bool = False
) -> Iterator[Change]:
    """Every setting that decides what is computed and is another one than in ``record``, in order of keys.

    A key that either lacks has its default: a version that adds one changes no run.

    Args:
        record: of the run, as run.json has it.
        recipe: what is asked for now.
        strict: also the length of the run, where it changes no step there was.
    """
    dump = without_credentials(recipe.model_dump(mode="json"))
    was, now = (recorded(Recipe, each, "run") for each in (record["recipe"], dump))
    passed_over = set() if strict else {*_free_length(was, now), *_unread_evaluation(was, now)}
    if now["train"]["precision"] == "auto":  # decided once the weights are known, and compared then
        passed_over.add("train.precision")
    for change in differences(was, now, Recipe):
        if not any(f"{change.key}.".startswith(f"{key}.") for key in passed_over):
            yield change
    yield from changed_plugins(record, recipe)


def changed_plugins(record: Mapping[str, Any], recipe: Recipe) -> Iterator[Change]:
    """Plugins whose code does something else than in the run, under the name of the file."""
    before = record.get("plugin_code") or {}
    for name, code in plugin_code(recipe).items():
        if before.get(name, code) != code:
            yield Change(f"the code of {name}", before[name], code)


def plugin_code(recipe: Recipe) -> dict[str, str]:
    """A hash of what each plugin's file does, whatever its comments and layout."""
    found = {}
    for name in recipe.plugins:
        module = sys.modules.get(f"prefopt_plugin_{Path(name).stem}")
        if module is not None and module.__file__ is not None:
            found[name] = code_hash(Path(module.__file__))
    return found


def differences(was: Any, now: Any, schema: Schema | None = None) -> Iterator[Change]:
    """Every difference of two JSON values, by key; two names of one file are none.

    Args:
        schema: of settings, whose keys have a default where one of the two lacks them.
    """
    yield from _differences((was, now), (), (was, now), schema)


def _differences(
    sides: tuple[Any, Any], path: KeyPath, whole: tuple[Any, Any], schema: Schema | None
) -> Iterator[Change]:
    was, now = sides
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted(was.keys() | now.keys()):
            one, other = (
                each[name] if name in each else _default(schema, (*path, name), raw)
                for each, raw in zip(sides, whole, strict=True)
            )
            yield from _differences((one, other), (*path, name), whole, schema)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, pair in enumerate(zip(was, now, strict=True)):
            yield from _differences(pair, (*path, index), whole, schema)
    elif was != now and not _same_file(was, now):
        yield Change(".".join(map(str, path)), was, now)


def _default(schema: Schema | None, path: KeyPath, raw: Any) -> Any:
    return _ABSENT if schema is None else default_at(schema, path, raw, _ABSENT)


def _same_file(was: Any, now: Any) -> bool:
    if not (isinstance(was, str) and isinstance(now, str)):
        return False
    try:
        return os.path.samefile(was, now)
    except (OSError, ValueError):
        return False


def _free_length(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """The length of a run does not count where no step depends on how many there are."""
    free = all(
        each["train"].get("lr_scheduler") == "constant" and each["train"].get("warmup_frac") == 0
        for each in (was, now)
    )
    return _LENGTH if free else ()


def _unread_evaluation(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What is measured changes no weights, unless the result is chosen by it."""
    chosen = any((each.get("eval") or {}).get("best") for each in (was, now))
    return () if chosen else ("eval", "data.eval")


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = show_value(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
