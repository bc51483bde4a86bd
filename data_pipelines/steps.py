"""Steps of a schedule: commands in processes of their own, and the files they are started with.

Separate processes, because a policy in vLLM and one in training do not fit one GPU, and nothing gives memory
back as surely as the end of a process.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from data_pipelines.filling import dump
from data_pipelines.manifest import changes
from prefopt.engines.child import GuardedProcess, describe_exit
from prefopt.errors import ConfigError, TrainingError
from prefopt.storage.cache import atomic_write

logger = logging.getLogger("prefopt.data")
_POLL_S = 0.2
_GRACE_S = 600.0
"""Time a step has to write a checkpoint after Ctrl-C."""

Files: TypeAlias = Sequence[tuple[Path, dict[str, Any]]]
"""YAML files of a step, with what they are to hold."""


def refuse_changes(files: Files, step: str, again: str) -> None:
    """Raises ConfigError if a step that has begun would now be another one.

    Args:
        files: of the step; those that are not there yet have not begun.
        step: what messages call it, e.g. ``round 2``.
        again: what to delete to make it again.
    """
    problems = []
    for path, raw in files:
        if path.is_file():
            was = yaml.safe_load(path.read_text(encoding="utf-8"))
            problems += [
                f"{step} has begun with another {path.name}: {change}. Put it back, or take another output_dir, "
                f"or delete {again} to make them again"
                for change in changes(was, json.loads(json.dumps(raw)))
            ]
    if problems:
        raise ConfigError(problems)


def write_files(files: Files) -> None:
    """Writes the files of a step, each whole or not at all."""
    for path, raw in files:
        with atomic_write(path) as temporary:
            temporary.write_text(dump(raw), encoding="utf-8")


def train(
    step: str,
    recipe: Path,
    final: Path,
    launch: str,
    script: str | None,
    prefopt: Callable[[Sequence[str], str], None] | None = None,
) -> None:
    """Trains ``recipe`` until ``final`` is there, by ``launch script``, else as `run_prefopt` or ``prefopt`` does.

    Raises: TrainingError.
    """
    if launch:
        run_command([*shlex.split(launch), str(script), str(recipe)], step)
    else:
        (prefopt or run_prefopt)(["train", str(recipe)], step)
    if not final.is_dir():
        raise TrainingError(f"{step}: training ended without {final}; run the same command again")


def run_prefopt(arguments: Sequence[str], step: str) -> None:
    """Runs ``prefopt ARGUMENTS`` with this Python. Raises: TrainingError."""
    run_command(
        [sys.executable, "-m", "prefopt.cli", *arguments], step, "prefopt " + shlex.join(arguments)
    )


def run_command(command: Sequence[str], step: str, shown: str = "") -> None:
    """Runs a command to its end; it ends with this process, however this one ends. Raises: TrainingError."""
    shown = shown or shlex.join(command)
    logger.info("$ %s", shown)
    process = GuardedProcess(list(command), os.environ, None)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
        code = process.poll()
    except KeyboardInterrupt:
        process.stop(_GRACE_S)
        raise
    finally:
        process.stop(0)
    if code:
        raise TrainingError(
            f"{step}: {shown}: {describe_exit(code)}; see what it said above. What is done stays done: run the "
            "same command again"
        )
