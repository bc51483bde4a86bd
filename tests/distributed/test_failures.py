"""One rank of a launch fails, dies, is told to stop or hangs: the others end with it, and its reason is said last.

The faults are made from inside, by an objective or a signal that knows which rank it runs on and how often it was
called: nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.launch import (
    Launched,
    accelerate_launching,
    cpu_config,
    launch,
    write_model,
    write_pairs,
    write_recipe,
)
from tests.pipelines.pipelines import wait_until
from tests.recipes.commands import HANG_S

PLUGIN = """
import os
import shutil
import signal as signals
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

from prefopt import Need, ObjectiveOutput, objective, signal
from prefopt.errors import SignalError
from prefopt.signals.base import per_response

CALLS = 0


def due(calls):
    global CALLS
    CALLS += 1
    return CALLS == calls and os.environ["RANK"] == "1"


def hang():
    threading.Event().wait()


FAULTS = {
    "raise": lambda: 1 / 0,
    "memory": lambda: torch.empty(2**58),
    "kill": lambda: os.kill(os.getpid(), signals.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signals.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signals.SIGTERM),
    "hang": hang,
}


@objective("faulty", needs={Need.PAIRS}, source="tests")
def faulty(lp, *, how: str, calls: int = 3):
    if due(calls):
        FAULTS[how]()
    chosen, rejected = (lp.policy.sum(-1) / lp.lengths)[lp.pairs].unbind(-1)
    return ObjectiveOutput(F.relu(1.0 - (chosen - rejected)))


@signal("faulty", source="tests")
def faulty_signal(*, how: str, run_dir: str, calls: int = 30):
    def score(prompt, text):
        if how == "disk" and due(calls):
            shutil.move(f"{run_dir}/policies", f"{run_dir}/moved")
            Path(f"{run_dir}/policies").write_text("in the way")
        if how == "signal" and due(calls):
            raise SignalError("the judge is on holiday")
        if how == "memory" and due(calls):
            raise MemoryError("no room for the judge")
        return sum(c in "aeiou" for c in text) / (1 + len(text))

    return per_response(score)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_pairs(directory / "pairs.jsonl", 30)
    (directory / "plugin.py").write_text(PLUGIN)
    return directory


def offline(directory: Path, inputs: Path, config: str, how: str, **sections: Any) -> Launched:
    """Eight steps of one micro-batch a rank, a checkpoint after each; rank 1 meets its fault in the third."""
    train = {"save_every": 1, **sections.pop("train", {})}
    recipe = write_recipe(
        directory / "recipe.yaml",
        inputs / "model",
        inputs / "pairs.jsonl",
        objective={"name": "faulty", "how": how, "beta": None},
        train=train,
        **sections,
    )
    recipe.write_text(f"{recipe.read_text()}plugins: [{inputs / 'plugin.py'}]\n")
    return launch(cpu_config(config, 2, directory), "preference", recipe)


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    found = directory.glob("run/checkpoints/step-*/prefopt.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def last_line(directory: Path, rank: int) -> str:
    """Of what a rank said."""
    return (directory / f"log-{rank}").read_text().strip().splitlines()[-1]


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_a_rank_that_raises_ends_the_launch_with_its_reason_and_the_checkpoint_that_stands(
    config: str, inputs: Path, tmp_path: Path
) -> None:
    done = offline(tmp_path, inputs, config, "raise")
    assert done.returncode == 1
    said = last_line(tmp_path, 0)
    assert said.startswith("[rank 0] rank 1 (")
    assert "ended while training step 3" in said
    assert "ZeroDivisionError: division by zero" in said
    assert f"saved step 2 of 8 in {tmp_path / 'run' / 'checkpoints'}" in said
    assert "ZeroDivisionError: division by zero" in (tmp_path / "log-1").read_text()  # rank 1's own
    assert steps(tmp_path) == [1, 2]


def test_out_of_memory_on_one_rank_names_its_rows_and_what_to_lower(
    inputs: Path, tmp_path: Path
) -> None:
    done = offline(tmp_path, inputs, "ddp", "memory")
    assert done.returncode == 1
    assert last_line(tmp_path, 1).startswith(
        "[rank 1] out of memory in step 3: a forward over 4 rows"
    )
    assert "(train.micro_batch_tokens = " in last_line(tmp_path, 1)
    assert "Set train.micro_batch_tokens = " in last_line(tmp_path, 1)
    assert "can't allocate memory" in last_line(tmp_path, 1)
    assert "Traceback" not in done.stderr


def test_a_rank_that_is_killed_is_named(inputs: Path, tmp_path: Path) -> None:
    done = offline(tmp_path, inputs, "ddp", "kill")
    assert done.returncode != 0
    assert last_line(tmp_path, 0).startswith("[rank 0] rank 1 (")
    assert "it is gone without a word" in last_line(tmp_path, 0)
    assert "saved step 2 of 8" in last_line(tmp_path, 0)
    assert "Traceback" not in done.stderr


def test_sigterm_to_one_rank_is_a_checkpoint_of_all(inputs: Path, tmp_path: Path) -> None:
    done = offline(tmp_path, inputs, "ddp", "term", train={"save_every": None})
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM while training: saved step 3 of 8 in" in done.stderr
    assert steps(tmp_path) == [3]
    ended = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert (
        ended["code"] == 143 and ended["signal"] == "SIGTERM" and "saved step 3" in ended["stands"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "freeze"])
def test_a_rank_that_is_stuck_is_named_with_its_stack(
    how: str, inputs: Path, tmp_path: Path
) -> None:
    done = offline(tmp_path, inputs, "ddp", how, run={"stuck_after_s": 20})
    assert done.returncode != 0
    assert "the run has not got on for more than 20 s (run.stuck_after_s): rank 1 (" in last_line(
        tmp_path, 0
    )
    if how == "hang":
        assert "training step 3" in last_line(tmp_path, 0)
        assert "plugin.py" in last_line(tmp_path, 0) and "in hang" in last_line(tmp_path, 0)
        assert "[rank 1] its stack:" in done.stderr
    else:  # what it said last is up to a second old
        assert "does not answer" in last_line(tmp_path, 0)


def online(directory: Path, inputs: Path, how: str) -> Launched:
    """Six steps that push every second; rank 1's signal meets its fault some steps in, before any checkpoint."""
    recipe = write_recipe(
        directory / "recipe.yaml",
        inputs / "model",
        inputs / "pairs.jsonl",
        data={"train": None, "prompts": [{"path": str(inputs / "pairs.jsonl"), "format": "text"}]},
        regime={"name": "rollouts", "samples_per_prompt": 3, "max_new_tokens": 6, "sync_every": 2},
        train={"global_batch_size": 4, "num_epochs": None, "max_steps": 8},
    )
    recipe.write_text(
        f"{recipe.read_text()}plugins: [{inputs / 'plugin.py'}]\n"
        f"signals: [{{name: faulty, how: {how}, run_dir: {directory / 'run'}}}]\n"
    )
    return launch(cpu_config("ddp", 2, directory), "online_dpo", recipe)


@pytest.mark.parametrize(
    ("how", "reason", "step"),
    [
        ("disk", "policies", 6),
        ("signal", "the judge is on holiday", 4),
    ],
)
def test_what_fails_between_two_steps_is_said_by_all_and_the_step_is_saved(
    how: str, reason: str, step: int, inputs: Path, tmp_path: Path
) -> None:
    """The push's file is rank 0's, the signal's failure rank 1's; both ranks save before they end."""
    done = online(tmp_path, inputs, how)
    assert done.returncode == 1
    for rank in (0, 1):
        own = [line for line in done.stderr.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert own and reason in own[-1], (rank, done.stderr)
    assert steps(tmp_path) == [step]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(2, signal.SIGTERM), (1, signal.SIGTERM), (2, signal.SIGUSR1)]
)
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint_and_no_process(
    processes: int, number: int, inputs: Path, tmp_path: Path
) -> None:
    """As a person types it. torchrun passes SIGTERM on; accelerate does not, nor either of them SIGUSR1."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        inputs / "model",
        inputs / "pairs.jsonl",
        train={"num_epochs": 5000},
    )
    config = cpu_config("ddp" if processes > 1 else "cpu", processes, tmp_path)
    ended = tmp_path / "run" / "ended.json"
    with accelerate_launching(config, "dpo", recipe) as launcher:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, "steps")
        launcher.send_signal(number)
        launcher.wait(HANG_S)
        wait_until(ended.exists, "its end")
    assert json.loads(ended.read_text())["code"] == 128 + signal.SIGTERM
    assert len(steps(tmp_path)) == 1
    wait_until(lambda: not is_running(recipe), "the end of every process")


def is_running(recipe: Path) -> bool:
    """Does any process have this recipe on its command line?"""
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return any(str(recipe) in line for line in lines)
