"""On how many processes a checkpoint can be gone on from: on any, but for what each of them keeps for itself."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from prefopt.errors import ConfigError

_BY_TYPE = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP"}


def check_processes(
    path: Path, written_by: int, accelerator: Accelerator, tied: str | None = None
) -> None:
    """Returns if this launch can go on from the checkpoint ``path``.

    Of one process and of DDP a checkpoint holds everything once, and which rows a step sees is no question of who
    computes it, so that one goes on where the other was. DeepSpeed and FSDP write a share of each process.

    Args:
        written_by: processes.
        tied: why the run itself has to go on on as many; None: it does not.

    Raises: ConfigError saying what was, what is, and how to go on.
    """
    number = accelerator.num_processes
    was, now = _writer(path), _BY_TYPE.get(accelerator.distributed_type)
    if was == now and written_by == number:
        return
    if was != now:
        why = f"what {was or now} keeps is divided over its processes, and a checkpoint is read as it was written"
    elif was is not None:
        why = (
            f"each process of {was} keeps its share of the weights and the optimizer's state, and dividing them "
            "anew (DeepSpeed's universal checkpoints) is not supported here"
        )
    elif tied is not None:
        why = tied
    else:
        return
    raise ConfigError(
        f"train.resume: {path} was written by {_named(written_by, was)}, this launch has {_named(number, now)}: "
        f"{why}. Start it as it was started, or use another run.output_dir to start afresh"
    )


def _writer(path: Path) -> str | None:
    """What divided the checkpoint, by the names that accelerate gives its files; None if it is whole."""
    if (path / "pytorch_model").is_dir():
        return "DeepSpeed"
    return "FSDP" if any(path.glob("pytorch_model_fsdp*")) else None


def _named(number: int, by: str | None) -> str:
    count = "1 process" if number == 1 else f"{number} processes"
    return f"{count} of {by}" if by else count
