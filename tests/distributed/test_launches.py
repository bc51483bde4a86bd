"""A launch whose processes would not know of each other is refused with the line that works here."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

import pytest
import yaml

from prefopt.cli import main
from prefopt.engines.child import free_port
from prefopt.errors import ConfigError
from prefopt.process.launch import check_launched, speaks
from tests.distributed.launch import ROOT, launch, write_model, write_pairs, write_recipe
from tests.recipes.commands import Prefopt, forked

OF_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
USE_CPU = {"ACCELERATE_USE_CPU": "True"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("variables", "devices", "found"),
    [
        ({}, 0, 1),
        ({}, 8, 1),
        (OF_TWO, 2, 2),
        (OF_TWO, 8, 2),
        (OF_TWO | USE_CPU, 0, 2),
        (OF_TWO | TORCHRUN, 2, 2),
        # Each process of a Slurm step may have been given one GPU to see.
        (OF_TWO, 1, 2),
        (OF_TWO | {"ACCELERATE_USE_DEEPSPEED": "true"}, 0, 2),
        (OF_TWO | {"ACCELERATE_USE_FSDP": "true"}, 2, 2),
        (BATCH_SCRIPT, 0, 1),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 0, 1),
        # A launcher inside a step, one a machine, and a step of runs that have nothing to do with each other.
        (STEP | OF_TWO, 2, 2),
        (STEP | {"WORLD_SIZE": "1"}, 0, 1),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, 0, 1),
        (BY_ACCELERATE, 0, 1),
        ({"MASTER_ADDR": "node7"}, 0, 1),
        # torch's variables of a single process, as a pod of one replica has them.
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, 0, 1),
    ],
)
def test_processes_that_will_know_of_each_other_are_counted(
    variables: dict[str, str], devices: int, found: int
) -> None:
    assert check_launched(variables, devices=devices).world_size == found


@pytest.mark.parametrize(
    ("variables", "devices", "said"),
    [
        (OF_TWO, 0, "WORLD_SIZE = 2: the launch started 2 processes for GPUs, and this machine"),
        (OF_TWO | {"ACCELERATE_USE_FSDP": "true"}, 0, "and this machine has none"),
        (OF_TWO | TORCHRUN, 1, "this machine has 1 GPU(s), and two processes cannot share one"),
        (OPEN_MPI, 2, "OMPI_COMM_WORLD_SIZE = 2: mpirun started 2 processes, and RANK, WORLD_SIZE"),
        (OPEN_MPI | USE_CPU, 0, "RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, 0, "PMI_SIZE = 4: mpirun started 4 processes"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, 0, "MV2_COMM_WORLD_SIZE = 4: mpirun started 4 processes"),
        (STEP, 8, "SLURM_STEP_NUM_TASKS = 4: srun started 4 processes"),
        (STEP, 8, "If each is meant to run alone, set WORLD_SIZE=1"),
        (BY_ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}, 0, "accelerate started one"),
        ({"WORLD_SIZE": "2"}, 2, "RANK and LOCAL_RANK do not say which of them this one is"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2, "LOCAL_RANK do not say which"),
        ({"WORLD_SIZE": "two"}, 2, "WORLD_SIZE = 'two': is not a number"),
        ({"WORLD_SIZE": "0"}, 2, "WORLD_SIZE = '0': is not a number"),
        ({"WORLD_SIZE": "-1"}, 2, "WORLD_SIZE = '-1': is not a number"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, 2, "RANK = 3, WORLD_SIZE = 1: a rank is below"),
        (
            {"LOCAL_RANK": "0"},
            2,
            "LOCAL_RANK = 0: says that a launcher started this process, and RANK and",
        ),
        (OF_TWO | {"RANK": "2"}, 2, "RANK = 2, WORLD_SIZE = 2: a rank is below"),
    ],
)
def test_processes_that_would_train_alone_are_refused(
    variables: dict[str, str], devices: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launched(variables, devices=devices)
    assert said in str(caught.value)


def test_an_address_of_the_job_script_is_no_launch_of_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`accelerate launch` of one process sets no MASTER_ADDR, but hands on the one it was started with."""
    variables = BY_ACCELERATE | {"MASTER_ADDR": "node7"}
    monkeypatch.setattr("prefopt.process.launch._PROC", tmp_path)
    monkeypatch.setattr("os.getppid", lambda: 7)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "environ").write_bytes(b"HOME=/\0MASTER_ADDR=node7\0")
    assert check_launched(variables, devices=0).world_size == 1
    (tmp_path / "7" / "environ").write_bytes(b"HOME=/\0")
    with pytest.raises(ConfigError):
        check_launched(variables, devices=0)


def test_one_process_of_a_machine_says_what_all_find() -> None:
    assert speaks({}) and speaks(OF_TWO | {"LOCAL_RANK": "0"}) and speaks(BATCH_SCRIPT)
    assert not speaks(OF_TWO) and not speaks(OPEN_MPI) and not speaks(STEP | {"SLURM_LOCALID": "1"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("launches")
    write_model(directory / "model")
    write_pairs(directory / "pairs.jsonl", 8)
    return write_recipe(directory / "recipe.yaml", directory / "model", directory / "pairs.jsonl")


def shipped(name: str, directory: Path, **changes: object) -> Path:
    """The configuration as a person takes it from the repository, for two processes."""
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text(encoding="utf-8")
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | {"num_processes": 2} | changes))
    return path


@pytest.mark.parametrize(
    ("name", "changes", "variables", "said"),
    [
        ("ddp", {}, {}, "and this machine has none"),
        ("ddp", {"use_cpu": True}, {}, "and this machine has none"),
        ("fsdp2", {}, {}, "and this machine has none"),
        ("fsdp2", {}, {"ACCELERATE_USE_CPU": "true"}, "asks for FSDP, accelerate set up MULTI_CPU"),
        ("zero2", {}, {"ACCELERATE_USE_CPU": "true"}, "asks for DEEPSPEED, accelerate set up MULTI"),
        ("cpu", {"distributed_type": "MULTI_CPU"}, {}, "and accelerate started one"),
    ],
)  # fmt: skip
def test_shipped_configuration_on_a_machine_without_gpus_is_refused(
    recipe: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, object],
    variables: dict[str, str],
    said: str,
) -> None:
    """Each used to train: eight processes by themselves, with an eighth of the loss, and "saved and verified"."""
    config = shipped(name, tmp_path, **changes)
    done = launch(config, "dpo", recipe, variables=variables)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(said) == 1, done.stderr
    assert f"accelerate_configs/cpu.yaml recipes/dpo.py {recipe}" in done.stderr
    assert not (recipe.parent / "run").exists()


def test_that_processes_exchange_anything_is_tried(recipe: Path, tmp_path: Path) -> None:
    """Where nothing that can be read from the variables is wrong: here two GPUs are claimed."""
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                forked(
                    _train_believing_in_gpus,
                    str(recipe),
                    log=tmp_path / f"log-{rank}",
                    environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
            for rank in range(2)
        ]
        codes, output = [each.wait() for each in ranks], "".join(each.output for each in ranks)
    assert codes == [2, 2], output
    assert output.count("the launcher started 2 processes, and accelerate set up 1 of type NO") == 1


def _train_believing_in_gpus(recipe: str) -> int:
    with mock.patch("prefopt.process.launch._num_devices", lambda: 2):
        return main(["train", recipe])


def test_commands_of_one_process_are_not_launched(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for words in (
        ["eval", tmp_path, "--tasks", "gsm8k", "--output", tmp_path / "out"],
        ["data", "build", tmp_path / "pipeline.yaml"],
        ["data", "schedule", tmp_path / "schedule.yaml"],
    ):
        said = Prefopt(capfd).refuses(*words)
        name = "eval" if words[0] == "eval" else f"data {words[1]}"
        assert f"prefopt {name} was started 2 times by a launcher" in said
        assert "Start it once" in said
