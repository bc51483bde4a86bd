"""Which processes a launcher started, and whether they can come to know of each other.

Training reads torch's own variables (WORLD_SIZE, RANK, LOCAL_RANK), which torchrun, `accelerate launch` and the
`deepspeed` command set. Where a launcher says in other words that there are several, each process would train by
itself, on a share of the data or on all of it, in one run directory: such a start is refused.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefopt.errors import ConfigError

_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Launch:
    """What the launcher said, in torch's variables."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Is this the process that speaks and writes for all?"""
        return self.rank == 0


@dataclass(frozen=True)
class _Other:
    """A launcher that counts in variables of its own."""

    name: str
    size: str
    rank: str
    local_rank: str


# The size of a Slurm *step*: SLURM_NTASKS also stands in the batch script itself, which is one process.
_OTHERS = (
    _Other("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Other("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    _Other("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    _Other("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)


def launched(variables: Mapping[str, str] | None = None) -> Launch:
    """What the launcher said of this process; one process where it said nothing.

    Raises: ConfigError for a variable that is no number, or one that contradicts another.
    """
    variables = os.environ if variables is None else variables
    found = {name: _number(variables, name) for name in _NAMES if name in variables}
    size, rank = found.get("WORLD_SIZE", 1), found.get("RANK", 0)
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in found]
    if size > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE = {size}: says that {size} processes train together, and {' and '.join(missing)} "
            f"do not say which of them this one is: it would train alone. Start it with a launcher that sets them "
            f"all ({_several(size)}), or unset WORLD_SIZE for one process"
        )
    if rank >= size:
        raise ConfigError(
            f"RANK = {rank}, WORLD_SIZE = {size}: a rank is below the number of processes. A launcher sets both "
            f"({_several(max(2, rank + 1))}); unset both for one process"
        )
    absent = [name for name in ("RANK", "WORLD_SIZE") if name not in found]
    if found.get("LOCAL_RANK", -1) >= 0 and absent:
        raise ConfigError(
            f"LOCAL_RANK = {found['LOCAL_RANK']}: says that a launcher started this process, and "
            f"{' and '.join(absent)} are not set, which one sets too. Unset it for one process; for several: "
            f"{_several(2)}"
        )
    return Launch(size, rank, found.get("LOCAL_RANK", 0), found.get("LOCAL_WORLD_SIZE", 1))


def speaks(variables: Mapping[str, str] | None = None) -> bool:
    """Is this the process of its machine that says what all of them find? Whatever the launcher's words."""
    variables = os.environ if variables is None else variables
    names = ["LOCAL_RANK", *(each.local_rank for each in _OTHERS if _size(each, variables) > 1)]
    return next((variables[name] for name in names if name in variables), "0") == "0"


def check_launched(
    variables: Mapping[str, str] | None = None, *, devices: int | None = None
) -> Launch:
    """What the launcher said, where the processes that it started can train together.

    Args:
        variables: default: this process's environment.
        devices: GPUs (or their like) of this machine; default: what torch sees, asked only of several processes.

    Raises: ConfigError with the command line that works on this machine.
    """
    variables = os.environ if variables is None else variables
    launch = launched(variables)
    if devices is None:
        devices = _num_devices() if launch.world_size > 1 else 0
    if problem := next(_problems(variables, launch, devices), None):
        raise ConfigError(problem)
    return launch


def require_one_process(what: str) -> None:
    """Raises ConfigError if a launcher started ``what`` several times: it works in one process."""
    launch = launched()
    if launch.world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE = {launch.world_size}: {what} was started {launch.world_size} times by a launcher, and "
            "each would do all of the work: it is one process, and starts by itself what it needs beside it. "
            f"Start it once: {_typed()}"
        )


def alone_on(kind: str, world_size: int, found: int) -> str:
    """What is wrong where a launch of several processes came to processes that do not know of each other."""
    return (
        f"WORLD_SIZE = {world_size}: the launcher started {world_size} processes, and accelerate set up {found} "
        f"of type {kind}: they exchange nothing, and each would train by itself. {_instead(world_size)}"
    )


def not_set_up(asked: str, found: str, device: str, world_size: int) -> str:
    """What is wrong where accelerate set up another distributed type than the configuration names."""
    needs = {"DEEPSPEED": "runs on CPU if ACCELERATE_USE_CPU is not set", "FSDP": "needs a GPU"}
    return (
        f"accelerate launch: the configuration asks for {asked}, accelerate set up {found} on {device}; {asked} "
        f"{needs[asked]}. {_instead(world_size)}"
    )


def _num_devices() -> int:
    """What accelerate gives the processes of a launch, one each; it takes no MPS for that."""
    import torch

    kind = torch.accelerator.current_accelerator()
    return 0 if kind is None or kind.type == "mps" else torch.accelerator.device_count()


def _problems(variables: Mapping[str, str], launch: Launch, devices: int) -> Iterator[str]:
    if "WORLD_SIZE" not in variables:
        yield from _other_launchers(variables)
    if launch.world_size == 1 or _flag(variables, "ACCELERATE_USE_CPU"):
        return
    if devices == 0 and not _flag(variables, "ACCELERATE_USE_DEEPSPEED"):  # which knows how on CPU
        yield (
            f"WORLD_SIZE = {launch.world_size}: the launch started {launch.world_size} processes for GPUs, and "
            "this machine has none (torch sees no device): they would not know of each other, and each would "
            f"train by itself. {_instead(launch.world_size)}"
        )
    # Where it is not torchrun's agent, each process may have been given a GPU of its own to see.
    if 0 < devices < launch.local_world_size and "TORCHELASTIC_RUN_ID" in variables:
        yield (
            f"LOCAL_WORLD_SIZE = {launch.local_world_size}: this machine has {devices} GPU(s), and two processes "
            f"cannot share one. Start {devices}: accelerate launch --config_file accelerate_configs/ddp.yaml "
            f"--num_processes {devices} {_script()}"
        )


def _other_launchers(variables: Mapping[str, str]) -> Iterator[str]:
    for each in _OTHERS:
        if (size := _size(each, variables)) > 1:
            names = f"RANK=${each.rank} WORLD_SIZE=${each.size} LOCAL_RANK=${each.local_rank}"
            yield (
                f"{each.size} = {size}: {each.name} started {size} processes, and RANK, WORLD_SIZE and LOCAL_RANK "
                "are not set: they would not know of each other, and each would train by itself on all of the "
                f"data. Start one launcher a machine instead: {_several(size)}; or give every process torch's "
                f"names: {each.name} … bash -c '{names} MASTER_ADDR=HOST0 MASTER_PORT=29500 {_typed()}'. If each "
                "is meant to run alone, set WORLD_SIZE=1 and give each a run.output_dir of its own"
            )
    if _launcher_left_out(variables):
        yield (
            "accelerate launch: the configuration asks for several processes and accelerate started one "
            "(distributed_type: MULTI_CPU without an MPI host file does that and says nothing). For several on "
            f"CPU: {_several(2)}; for one: {_one()}"
        )


def _launcher_left_out(variables: Mapping[str, str]) -> bool:
    """Did `accelerate launch` prepare for several processes and start this one alone?

    It then set an address for them to meet at, which it does not for one; unless it found it in its own
    environment, as in a job script that exports MASTER_ADDR.
    """
    if not {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= variables.keys():
        return False
    try:
        environment = (_PROC / str(os.getppid()) / "environ").read_bytes()
    except OSError:  # not Linux, or not our process
        return True
    return not any(each.startswith(b"MASTER_ADDR=") for each in environment.split(b"\0"))


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not text.isdecimal() or (name.endswith("SIZE") and int(text) == 0):
        raise ConfigError(
            f"{name} = {text!r}: is not a number of processes or of one of them. A launcher sets it "
            f"({_several(2)}); unset it for one process"
        )
    return int(text)


def _size(other: _Other, variables: Mapping[str, str]) -> int:
    text = variables.get(other.size, "")
    return int(text) if text.isdecimal() else 1


def _flag(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def _instead(world_size: int) -> str:
    several = f"; {world_size} processes: {_several(world_size)}" if world_size > 1 else ""
    return f"On CPU, one process: {_one()}{several}"


def _one() -> str:
    return f"accelerate launch --config_file accelerate_configs/cpu.yaml {_script()}"


def _several(world_size: int) -> str:
    return (
        "ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/ddp.yaml "
        f"--num_processes {world_size} {_script()}"
    )


def _script() -> str:
    """What was started, as `accelerate launch` takes it."""
    program, *arguments = sys.argv
    if program.endswith(".py"):
        return shlex.join([_short(program), *arguments])
    return shlex.join(["-m", "prefopt.cli", *arguments])


def _typed() -> str:
    """What was started, without a launcher."""
    program, *arguments = sys.argv
    if program.endswith(".py"):
        return shlex.join(["python", _short(program), *arguments])
    return shlex.join([Path(program).name, *arguments])


def _short(program: str) -> str:
    path = Path(program)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else program
