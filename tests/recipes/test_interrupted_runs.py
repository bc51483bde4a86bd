"""Runs that are killed, interrupted or run out of disk: the same command goes on as if nothing had been.

Everything here is a process of its own (tests/recipes/commands.py); one CPU thread, dropout on so that a
lost random state would show, checkpoints that fall between two rows of metrics.jsonl.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from prefopt.cli import main
from prefopt.process.stopping import Stopped
from prefopt.training.checkpoint import Checkpoints
from prefopt.training.interrupts import Interrupts
from tests.distributed.launch import write_model, write_pairs, write_recipe
from tests.recipes.commands import prefopt, run

NUM_STEPS = 24
# Clocks and memory differ from run to run; everything else is computed.
MEASURED = {"time/window_s", "time/train_s", "tokens/per_s", "memory/peak_gib"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_pairs(directory / "pairs.jsonl", 26)
    return directory


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing happened to."""
    recipe = recipe_in(tmp_path_factory.mktemp("undisturbed"), inputs)
    code, output = run(*command_of(recipe), log=recipe.parent / "log")
    assert code == 0, output
    assert [row["step"] for row in rows(recipe.parent / "run")] == [0, 5, 10, 15, 20, NUM_STEPS]
    return recipe.parent / "run"


def recipe_in(directory: Path, inputs: Path) -> Path:
    """DPO with LoRA and dropout, 4 epochs of 6 steps, checkpoints every 2 and rows every 5."""
    return write_recipe(
        directory / "recipe.yaml",
        inputs / "model",
        inputs / "pairs.jsonl",
        peft={"r": 8, "lora_dropout": 0.2},
        data={"eval_frac": 0.1},
        train={"global_batch_size": 4, "num_epochs": 4, "save_every": 2, "log_every": 5},
    )


def command_of(recipe: Path) -> tuple[str, ...]:
    """The arguments of every start, the first and the later ones."""
    return "train", str(recipe), "model.disable_dropout=false"


def held_at(last: int, arguments: Sequence[str]) -> int:
    """`prefopt ARGUMENTS` that waits at the checkpoint of step ``last``: killed late, it still has not ended."""
    save = Checkpoints.save

    def save_or_wait(self: Checkpoints, step: int, *state: Any, **more: Any) -> Path:
        if step == last:
            signal.pause()
        return save(self, step, *state, **more)

    Checkpoints.save = save_or_wait
    return main(arguments)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; none before there is a file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(run_dir: Path) -> int:
    """Complete lines of metrics.jsonl, which may be being written."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [path.parent.name for path in run_dir.glob("checkpoints/step-*/prefopt.json")]
    return sorted(int(name.removeprefix("step-")) for name in names)


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The same bits in final/, the same rows of everything that is computed."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run_dir / "final" / name).read_bytes() == (other / "final" / name).read_bytes()
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in MEASURED} for row in rows(path)]
        for path in (run_dir, other)
    )
    assert ours == theirs
    assert "loss/total" in ours[-1] and "eval/rewards/accuracy" in ours[-1]


def test_run_killed_at_random_steps_ends_bit_for_bit_as_the_undisturbed_one(
    tmp_path: Path, inputs: Path, undisturbed: Path
) -> None:
    """One run, killed with nothing saved yet, in the midst of steps, and of writing a checkpoint."""
    recipe, run_dir = recipe_in(tmp_path, inputs), tmp_path / "run"
    moments = {
        "the run directory": lambda: (run_dir / "run.json").exists(),
        "a row": lambda: logged(run_dir) >= 2,
        "half a checkpoint": lambda: (
            any(run_dir.glob("checkpoints/tmp-*")) or checkpoints(run_dir)[-1] > 12
        ),
        "a late row": lambda: logged(run_dir) >= 4,
    }
    delays = random.Random(20)
    for what, reached in moments.items():
        held = functools.partial(held_at, NUM_STEPS)
        with prefopt(*command_of(recipe), log=tmp_path / "log", entry=held) as command:
            command.wait_until(reached, what)
            if what.endswith("row"):
                time.sleep(delays.uniform(0, 0.05))
            command.send(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL, command.output
    assert NUM_STEPS not in checkpoints(run_dir) != []
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert "resumed from" in output
    assert_same_run(run_dir, undisturbed)
    assert checkpoints(run_dir) == checkpoints(undisturbed) == [NUM_STEPS - 2, NUM_STEPS]
    assert not list(run_dir.glob("checkpoints/tmp-*"))


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_finishes(
    tmp_path: Path, inputs: Path, undisturbed: Path
) -> None:
    recipe, run_dir = recipe_in(tmp_path, inputs), tmp_path / "run"
    with prefopt(*command_of(recipe), log=tmp_path / "log") as command:
        command.wait_until(lambda: logged(run_dir) >= 2, "a row")
        command.send(signal.SIGINT)
        assert command.wait() == 130
        output = command.output
    stopped_at = checkpoints(run_dir)[-1]
    assert 5 <= stopped_at < NUM_STEPS
    assert "saving and stopping after this step; Ctrl-C again stops at once" in output
    assert (
        f"stopped by SIGINT while training: saved step {stopped_at} of {NUM_STEPS} in {run_dir}"
        in output
    )
    assert "run the same command to go on" in output
    assert "Traceback" not in output
    assert not (run_dir / "final").exists()
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert f"resumed from {run_dir / 'checkpoints' / f'step-{stopped_at}'}" in output
    assert_same_run(run_dir, undisturbed)


def test_second_ctrl_c_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts(Accelerator(cpu=True)) as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            interrupts.check()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one did not stop it")
    assert capfd.readouterr().err.count("saving and stopping") == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.bin"])
def test_full_disk_keeps_the_previous_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, inputs: Path, undisturbed: Path, too_large: str
) -> None:
    """RLIMIT_FSIZE, lowered while the run is under way: the system refuses to write the next checkpoint.

    The two files are written by safetensors and by torch, whose errors have nothing in common.
    """
    recipe, run_dir = recipe_in(tmp_path, inputs), tmp_path / "run"
    with prefopt(*command_of(recipe), log=tmp_path / "log") as command:
        command.wait_until(lambda: bool(checkpoints(run_dir)), "a checkpoint")
        size = (undisturbed / "checkpoints" / f"step-{NUM_STEPS}" / too_large).stat().st_size
        limit_file_size(command.pid, size - 1)
        assert command.wait() == 1
        output = command.output
    kept = checkpoints(run_dir)[-1]
    assert kept < NUM_STEPS - 2
    assert f"the checkpoint of step {kept + 2} could not be written to {run_dir}" in output
    assert f"MiB free there): {'' if too_large == 'optimizer.bin' else 'Error while'}" in output
    assert f"the previous checkpoint {run_dir / 'checkpoints' / f'step-{kept}'} is intact" in output
    assert "Free space and run the same command to go on" in output
    assert "Traceback" not in output
    assert not list(run_dir.glob("checkpoints/tmp-*"))  # it gives back the space it took
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert_same_run(run_dir, undisturbed)


def test_full_disk_while_logging_is_said_and_the_torn_row_is_written_again(
    tmp_path: Path, inputs: Path, undisturbed: Path
) -> None:
    recipe, run_dir = recipe_in(tmp_path, inputs), tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    # Larger than any other file of the run, so that only the row after it meets the limit.
    padding = 1 << 18
    with prefopt(*command_of(recipe), log=tmp_path / "log") as command:
        command.wait_until(lambda: logged(run_dir) >= 2 and bool(checkpoints(run_dir)), "a row")
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 99, "padding": " " * padding}) + "\n")
        limit_file_size(command.pid, metrics.stat().st_size + 20)
        assert command.wait() == 1
        output = command.output
    assert f"{metrics} cannot be written" in output
    assert "run the same command: it goes on from the newest checkpoint" in output
    assert "Traceback" not in output
    assert not metrics.read_text().endswith("\n")  # 20 bytes of a row
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert_same_run(run_dir, undisturbed)


def test_what_stands_where_final_goes_is_named_and_final_is_made_by_the_same_command(
    tmp_path: Path, inputs: Path, undisturbed: Path
) -> None:
    recipe, run_dir = recipe_in(tmp_path, inputs), tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "final")
    (run_dir / "final").write_text("in the way")
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 2, output  # before anything loads
    assert f"{run_dir / 'final'} stands where the run writes a directory" in output
    assert "Traceback" not in output
    (run_dir / "final").unlink()
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert_same_run(run_dir, undisturbed)


def limit_file_size(pid: int, size: int) -> None:
    """No file of process ``pid`` grows past ``size`` bytes from now on; needs no privilege."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
