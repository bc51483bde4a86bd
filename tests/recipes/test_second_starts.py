"""Two starts with one directory: the second is refused and told who has it; a launch is one holder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.storage.holder import HOLDER_FILE, LOCK_FILE, held
from tests.distributed.launch import cpu_config, launch
from tests.recipes.commands import Command, Prefopt, forked, prefopt


def _hold(root: str) -> int:
    with held(Path(root), work="run"):
        Path(root, "ready").touch()
        signal.pause()
    return 0


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Command]:
    """A process that holds ``tmp_path/out`` and ``tmp_path/run``, by a link."""
    (tmp_path / "out").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "out")
    log = tmp_path / "other"
    with forked(_hold, str(tmp_path / "out"), log=log, environment=dict(os.environ)) as command:
        command.wait_until((tmp_path / "out" / "ready").exists, "holding it")
        yield command


def test_a_second_training_is_refused_and_the_first_goes_on(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    """A run in the middle; then it is killed, and the same command goes on at once."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ("train", str(recipe), "train.num_epochs=2000.0", "train.save_every=2")
    with prefopt(*words, log=log) as first:
        first.wait_until(lambda: any(run_dir.glob("checkpoints/step-*")), "a checkpoint")
        said = command.refuses(*words, code=1)
        assert f"{run_dir}: is in use by another run (process {first.pid} on " in said
        assert "Another run.output_dir is free" in said
        first.send(signal.SIGKILL)
        first.wait()
    assert (run_dir / HOLDER_FILE).exists()
    with prefopt(*words, log=log) as again:
        again.wait_until(lambda: "resumed from" in again.output, "its checkpoint")
        again.send(signal.SIGINT)
        assert again.wait() == 130
    assert not (run_dir / HOLDER_FILE).exists()


def test_evaluations_builds_and_schedules_too(
    command: Prefopt, other: Command, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline, schedule = tmp_path / "pipeline.yaml", tmp_path / "schedule.yaml"
    stages = [{"stage": "rated", "sources": [{"path": str(inputs / "pairs.jsonl")}]}]
    pipeline.write_text(json.dumps({"output_dir": str(out), "stages": stages}))
    pairs = ("--tasks", "pair_accuracy", f"tasks.pair_accuracy.data={inputs / 'pairs.jsonl'}")
    steps = [{"name": "first", "pipeline": str(pipeline)}]
    schedule.write_text(json.dumps({"output_dir": str(out), "steps": steps}))
    for words, work in (
        (("eval", inputs / "model", *pairs, "--output", out), "evaluation"),
        (("data", "build", pipeline), "build"),
        (("data", "schedule", schedule), "schedule"),
    ):
        said = command.refuses(*words, code=1)
        assert f"{out}: is in use by another {work} (process {other.pid} on " in said, words


def test_a_launch_is_refused_as_one_and_is_one_holder(
    recipe: Path, other: Command, tmp_path: Path
) -> None:
    config = cpu_config("ddp", 2, tmp_path)
    done = launch(config, "dpo", recipe)
    assert done.returncode == 1
    assert done.stderr.count(f"is in use by another run (process {other.pid} on ") == 1
    other.send(signal.SIGKILL)
    other.wait()
    done = launch(config, "dpo", recipe)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final").is_dir() and not (tmp_path / "out" / HOLDER_FILE).exists()
    # A finished run says so once, and its processes end together.
    done = launch(config, "dpo", recipe)
    assert done.returncode == 0 and done.stderr.count("nothing to train") == 1, done.stderr


def test_a_directory_that_not_all_processes_see_is_refused_by_all(
    recipe: Path, tmp_path: Path
) -> None:
    """As ~ is on machines without a shared home: each would find its own checkpoints, or none."""
    homes = [tmp_path / "home0", tmp_path / "home1"]
    done = launch(
        cpu_config("ddp", 2, tmp_path), "dpo", recipe, "run.output_dir=~/run",
        of_rank=lambda rank: {"HOME": str(homes[rank])},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("is not one directory for all processes: 1 of 2 do not see") == 1
    assert f":{homes[1]}/run)" in done.stderr
    assert [path.name for path in tmp_path.glob("home*/run/*")] == [LOCK_FILE]
