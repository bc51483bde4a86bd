"""Which launch goes on from which checkpoint: any from a whole one, the same from one that is divided."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from prefopt.errors import ConfigError
from prefopt.rollouts.regime import RolloutRegime
from prefopt.training.divided import check_processes
from prefopt.training.regimes import OfflineRegime

FILES = {
    "whole": "model.safetensors",
    "DeepSpeed": "pytorch_model/x",
    "FSDP": "pytorch_model_fsdp_0/x",
}
TYPES = {
    "one": DistributedType.NO, "DDP": DistributedType.MULTI_GPU, "DDP on CPUs": DistributedType.MULTI_CPU,
    "DeepSpeed": DistributedType.DEEPSPEED, "FSDP": DistributedType.FSDP,
}  # fmt: skip


def gone_on_with(
    tmp_path: Path, kind: str, written_by: int, launch: str, number: int, tied: str | None
) -> str | None:
    """What is said against it; None if nothing is."""
    checkpoint = tmp_path / "checkpoints" / "step-3"
    (checkpoint / FILES[kind]).parent.mkdir(parents=True)
    (checkpoint / FILES[kind]).touch()
    accelerator: Any = SimpleNamespace(num_processes=number, distributed_type=TYPES[launch])
    try:
        check_processes(checkpoint, written_by, accelerator, tied)
    except ConfigError as error:
        assert "Start it as it was started, or use another run.output_dir" in str(error)
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "written_by", "launch", "number"),
    [
        ("whole", 1, "one", 1),
        ("whole", 1, "DDP", 8),
        ("whole", 8, "one", 1),
        ("whole", 2, "DDP on CPUs", 4),
        ("DeepSpeed", 2, "DeepSpeed", 2),
        ("FSDP", 2, "FSDP", 2),
    ],
)
def test_it_is_gone_on_with(
    tmp_path: Path, kind: str, written_by: int, launch: str, number: int
) -> None:
    assert gone_on_with(tmp_path, kind, written_by, launch, number, None) is None


@pytest.mark.parametrize(
    ("kind", "written_by", "launch", "number", "said"),
    [
        ("DeepSpeed", 2, "DeepSpeed", 4, "written by 2 processes of DeepSpeed, this launch has 4"),
        ("DeepSpeed", 2, "DeepSpeed", 4, "keeps its share of the weights and the optimizer's state"),
        ("DeepSpeed", 2, "DDP", 2, "this launch has 2 processes: what DeepSpeed keeps is divided"),
        ("whole", 1, "DeepSpeed", 1, "written by 1 process, this launch has 1 process of DeepSpeed"),
        ("whole", 2, "FSDP", 2, "what FSDP keeps is divided"),
        ("FSDP", 2, "FSDP", 1, "written by 2 processes of FSDP, this launch has 1 process of FSDP"),
        ("FSDP", 2, "DeepSpeed", 2, "what FSDP keeps is divided"),
    ],
)  # fmt: skip
def test_it_is_refused_by_name(
    tmp_path: Path, kind: str, written_by: int, launch: str, number: int, said: str
) -> None:
    assert said in str(gone_on_with(tmp_path, kind, written_by, launch, number, None))


def test_a_run_with_rollouts_goes_on_on_as_many() -> None:
    assert OfflineRegime.tied_to_processes is None
    assert "rollouts keeps a log" in str(RolloutRegime.tied_to_processes)


def test_what_ties_a_run_is_said_and_matters_only_where_the_number_changes(tmp_path: Path) -> None:
    tied = RolloutRegime.tied_to_processes
    assert gone_on_with(tmp_path / "a", "whole", 2, "DDP", 2, tied) is None
    assert str(tied) in str(gone_on_with(tmp_path / "b", "whole", 2, "one", 1, tied))
