"""Runs a schedule: each step a command in a process of its own.

Separate processes, because a policy in vLLM and one in training do not fit one GPU, and nothing gives memory
back as surely as the end of a process. Every step can be repeated: a pipeline goes on at its last shard, a run at
its last checkpoint, and what is done is left alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from data_pipelines.manifest import changes
from data_pipelines.schedule.base import Found, Schedule, Task
from data_pipelines.schedule.walk import Walk
from prefopt.engines.child import GuardedProcess, describe_exit
from prefopt.errors import ConfigError, TrainingError
from prefopt.recipe.yaml_file import read_yaml
from prefopt.recipe.yaml_values import dump_yaml
from prefopt.storage.cache import atomic_write
from prefopt.storage.holder import held

logger = logging.getLogger("prefopt.data")
_POLL_S = 0.2
_GRACE_S = 600.0
"""Time a step has to write a checkpoint after Ctrl-C."""

Start: TypeAlias = Callable[[Sequence[str]], int]
"""Runs a command to its end and returns its exit code, negative for a signal."""


def check_schedule(schedule: Schedule) -> list[Task]:
    """Every step in order, were each turn of each loop a gain.

    Raises: ConfigError with all that can be known to be wrong before the first step: placeholders, pipelines,
        recipes. Files that an earlier step makes are not there to check.
    """
    problems: list[str] = []
    scores = itertools.count(1e9, 1e9)  # above any start, and a gain whatever `min_gain`

    def look(task: Task) -> Found:
        found = [each for each in task.settings.problems(task) if "${" not in each]
        problems.extend(f"{task.step.label}: {each}" for each in found)
        return Found(next(scores) if task.settings.is_scored(task) else None)

    walk = Walk(schedule, look).take()
    if found := list(dict.fromkeys([*schedule.problems, *walk.problems, *problems])):
        raise ConfigError(found, source=str(schedule.source))
    return [task for task, _ in walk.found]


def run_schedule(schedule: Schedule, start: Start | None = None) -> Walk:
    """Runs what is not done yet.

    Args:
        schedule: what to run.
        start: runs a command; default: `run_command`. (Small models may do without processes.)

    Raises: ConfigError for steps that cannot work, or that changed since they began; TrainingError, DataError
        for a step that failed: the same command goes on there.
    """
    check_schedule(schedule)
    with held(schedule.output_dir, work="schedule", advice="Another output_dir is free"):
        walk = Walk(schedule, partial(_run, start or run_command)).take()
    if walk.problems:
        raise ConfigError(walk.problems, source=str(schedule.source))
    return walk


def done_so_far(schedule: Schedule) -> Walk:
    """What is done, up to the first step that is not."""
    walk = Walk(schedule, _found)
    try:
        return walk.take()
    except _NotDoneError:
        return walk


def run_command(command: Sequence[str]) -> int:
    """Runs a command; it ends with this process, however this one ends."""
    process = GuardedProcess(list(command), os.environ, None)
    try:
        while (code := process.poll()) is None:
            time.sleep(_POLL_S)
        return code
    except KeyboardInterrupt:
        process.stop(_GRACE_S)
        raise
    finally:
        process.stop(0)


class _NotDoneError(Exception):
    pass


def _found(task: Task) -> Found:
    if not task.settings.is_done(task):
        raise _NotDoneError
    return task.settings.found(task)


def _run(start: Start, task: Task) -> Found:
    _refuse_changes(task)
    if not task.settings.is_done(task):
        with atomic_write(task.file) as temporary:
            text = dump_yaml(task.raw)
            temporary.write_text(text, encoding="utf-8")
        program, *arguments = task.settings.command(task)
        shown = shlex.join([program, *arguments])
        logger.info("%s: $ %s", task.title, shown)
        own = [sys.executable, "-m", "prefopt.cli"]
        code = start([*(own if program == "prefopt" else [program]), *arguments])
        if code:
            raise TrainingError(
                f"{task.title}: {shown}: {describe_exit(code)}; see what it said above. What is done stays done: "
                "run the same command again"
            )
        if not task.settings.is_done(task):
            result = task.settings.result(task)
            raise TrainingError(f"{task.title}: {shown} ended without {result}; run it again")
    return task.settings.found(task)


def _refuse_changes(task: Task) -> None:
    """Raises ConfigError if a step that has begun would now be another one."""
    if not task.file.is_file():
        return
    try:
        was = read_yaml(task.file)
    except ConfigError as error:
        problems = error.problems
    else:
        problems = list(was.problems)
    if problems:
        advice = "Restore it, or delete it: the step then begins with what the schedule says"
        raise ConfigError([f"{problem}. {advice}" for problem in problems], source=str(task.file))
    again = task.place.folder if task.place.turns else f"{task.file} and {task.output}"
    problems = [
        f"{task.title} has begun with another {task.file.name}: {change}. Put it back, or take another "
        f"output_dir, or delete {again} and the steps after it to make them again"
        for change in changes(was.raw, json.loads(json.dumps(task.raw)))
    ]
    if problems:
        raise ConfigError(problems)
