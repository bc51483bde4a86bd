"""A start of a run: its directory held, seen by all processes alike, and where it goes on.

The main process decides and tells the others. Each would find the same in the directory, but for a machine that
does not see it, or sees it a moment later.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import gather_object

from prefopt.data import DataBundle
from prefopt.errors import ConfigError
from prefopt.model.distributed import (
    check_launch,
    decided_by_main,
    process_group_options,
)
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.run_directory import Change, used_directory
from prefopt.recipe.schema import Recipe
from prefopt.storage.cache import writing
from prefopt.storage.holder import held
from prefopt.storage.run_files import RUN_FILE, read_run

logger = logging.getLogger(__name__)

IN_USE_ADVICE = "Another run.output_dir is free"
_SEEN_WITHIN_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Start:
    """Where a start begins; the same on every process."""

    resume_from: Path | None
    record: dict[str, Any] | None
    """Of the run that it goes on with; None for one that begins, or of which nothing is known."""
    before: dict[str, Any] | None
    """What run.json says now; None where there is none."""
    is_finished: bool


def open_accelerator(recipe: Recipe) -> Accelerator:
    """The processes of the launch, as the recipe needs them.

    Raises: ConfigError if they are not what the launch asked for.
    """
    # Of DDP, where it looks for idle weights and all have their part.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    precision = recipe.train.precision
    precision = "no" if precision in ("fp32", "auto") else precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(recipe.run.trackers) or None,
            project_dir=recipe.run.output_dir,
            kwargs_handlers=process_group_options(
                max(recipe.longest_wait_s, recipe.run.stuck_after_s)
            ),
        )
    except ValueError as error:  # e.g. fp16 on a device that has none
        raise ConfigError(f"train.precision = {recipe.train.precision}: {error}") from error
    check_launch(accelerator)
    return accelerator


@contextlib.contextmanager
def run_held(accelerator: Accelerator, run_dir: Path) -> Iterator[None]:
    """Holds the directory of a run, one holder for all its processes, until the block ends. A collective.

    Raises: InUseError if another start has it; ConfigError if a process does not see it.
    """
    with contextlib.ExitStack() as stack:
        decided_by_main(
            accelerator,
            lambda: stack.enter_context(held(run_dir, work="run", advice=IN_USE_ADVICE)),
        )
        _check_shared(accelerator, run_dir)
        yield


def find_start(accelerator: Accelerator, recipe: Recipe, data: DataBundle) -> Start:
    """Where this start begins. A collective.

    Raises: ConfigError if the directory is of other settings or data, and `train.accept_changes` is not set.
    """
    return decided_by_main(accelerator, lambda: _decided(recipe, data))


def check_weights(recipe: Recipe, start: Start, policy: LoadedPolicy) -> None:
    """Raises ConfigError if the run that is gone on with began with other weights under the same name."""
    was = ((start.record or {}).get("weights") or {}).get("hash")
    if was not in (None, policy.weights_hash):
        _accept(recipe, [Change("the weights at model.path", was[:12], policy.weights_hash[:12])])


def check_length(recipe: Recipe, step: int, num_steps: int) -> None:
    """Raises ConfigError if the run is past its end already: a checkpoint of an earlier step would not be one."""
    if step > num_steps:
        name = "num_epochs" if recipe.train.max_steps is None else "max_steps"
        raise ConfigError(
            f"train.{name} = {getattr(recipe.train, name)}: gives {num_steps} steps, and the run in "
            f"run.output_dir = {recipe.run.output_dir} has done {step}. Use at least as many, or another "
            "run.output_dir"
        )


def _decided(recipe: Recipe, data: DataBundle) -> Start:
    run_dir = Path(recipe.run.output_dir)
    used = used_directory(recipe)
    before = read_run(run_dir) if (run_dir / RUN_FILE).is_file() else None
    if used is None:
        return Start(None, None, before, is_finished=False)
    changes = list(_changed_data(used.record, data)) if used.record is not None else []
    _accept(recipe, [*used.changes, *changes])
    finished = used.is_finished and not changes
    return Start(used.checkpoint, used.record, before, finished)


def _changed_data(record: dict[str, Any], data: DataBundle) -> Iterator[Change]:
    """Rows are compared by their tokens: a file that was changed, another chat template, but not another path."""
    found = record.get("data") or {}
    for name, source in (("train", data.train), ("prompts", data.prompts)):
        was, now = found.get(f"{name}_hash"), None if source is None else source.fingerprint
        if was is not None and now is not None and was != now:
            yield Change(f"the rows of data.{name}", was[:12], now[:12])


def _accept(recipe: Recipe, changes: list[Change]) -> None:
    """Says what is another one, or refuses it."""
    if changes and not recipe.train.accept_changes:
        raise ConfigError(
            [
                f"{change}, since the weights in run.output_dir = {recipe.run.output_dir} were made. Put it back, "
                "use another run.output_dir, or set train.accept_changes=true to go on all the same"
                for change in changes
            ]
        )
    for change in changes:
        logger.warning("going on with another setting: %s", change)


def _check_shared(accelerator: Accelerator, run_dir: Path) -> None:
    """Raises ConfigError on every process if one does not see what the main one writes into ``run_dir``."""
    if accelerator.num_processes == 1:
        return
    # A new name each time: that a file was not there a while ago is remembered by NFS, too.
    mark = run_dir / decided_by_main(accelerator, lambda: f".seen-{uuid4().hex}")
    try:
        decided_by_main(accelerator, lambda: _make(mark))
        mine = None if _appears(mark) else (socket.gethostname(), str(run_dir.absolute()))
        blind = [each for each in gather_object([mine]) if each is not None]
    finally:
        if accelerator.is_main_process:
            mark.unlink(missing_ok=True)
    if blind:
        here = decided_by_main(accelerator, lambda: f"{socket.gethostname()}:{run_dir.absolute()}")
        there = ", ".join(sorted({f"{host}:{path}" for host, path in blind}))
        raise ConfigError(
            f"run.output_dir = {run_dir}: is not one directory for all processes: {len(blind)} of "
            f"{accelerator.num_processes} do not see what the main one writes ({here}; theirs: {there}). Every "
            "process writes a part of a checkpoint there. Give a path on a file system that all machines share, "
            "in full"
        )


def _make(path: Path) -> None:
    with writing(path):
        path.touch()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
