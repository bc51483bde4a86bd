"""Checkpoints: complete or absent, never half, and enough to go on bit for bit.

A checkpoint is written to a temporary directory and renamed when every process has finished; a kill or
a full disk at any moment leaves the previous one as it was. Only trainable weights are stored: the base
of an adapter is where the recipe says it is. Its state holds a checksum of every other file and a seal of
itself, so that a bit that flips is noticed before anything goes on from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from accelerate.utils import load as load_file_of_accelerate
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prefopt.errors import ConfigError, TrainingError
from prefopt.model.distributed import together
from prefopt.storage.cache import by_umask
from prefopt.storage.run_files import complete_checkpoints
from prefopt.training.divided import check_processes
from prefopt.training.integrity import checkpoint_damage, checkpoint_sums, read_state, write_state

logger = logging.getLogger(__name__)

# What writing raises on a full disk: torch a RuntimeError, safetensors an error of its own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
_DAMAGED = (*WRITE_ERRORS, ValueError, KeyError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """The ``checkpoints/`` directory of a run.

    Args:
        root: the directory.
        accelerator: after ``prepare`` of the model and optimizer it is to save.
        keep: newest checkpoints to keep.
    """

    def __init__(self, root: Path, accelerator: Accelerator, *, keep: int) -> None:
        self.root = root
        self.accelerator = accelerator
        self.keep = keep
        self.kept_step: int | None = None
        """A checkpoint to keep beside the newest ones."""
        if accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            accelerator.register_save_state_pre_hook(_keep_trainable)
            accelerator.register_load_state_pre_hook(_load_trainable)

    def save(
        self, step: int, state: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Path:
        """Writes the checkpoint of ``step``; TrainingError (and no trace of it) if it cannot be written.

        Args:
            state: JSON, the same on every process.
            tensors: what this process must keep beside its shard of the weights.
        """
        accelerator = self.accelerator
        temporary, final = self.root / f"tmp-step-{step}", self.root / f"step-{step}"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        what = f"writing the checkpoint of step {step}"
        try:
            with self._all_or_none(what):
                temporary.mkdir(parents=True, exist_ok=True)
                accelerator.save_state(str(temporary), **self._save_options())
                if tensors:
                    held = {
                        name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()
                    }
                    save_file(held, temporary / self._tensor_file)
            sums = checkpoint_sums(accelerator, temporary)
            with together(accelerator, what):
                if accelerator.is_main_process:
                    write_state(temporary, {**state, "step": step}, sums)
                    _publish(temporary, final)
        except WRITE_ERRORS as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(self._failure(step, error)) from error
        self._prune()
        return final

    @contextlib.contextmanager
    def _all_or_none(self, what: str) -> Iterator[None]:
        """Every process's part is written, or all raise.

        Where weights are sharded a failed process cannot say so in a collective: the others are in one of
        DeepSpeed's. They learn of it from `prefopt.process.ranks`.
        """
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            yield
            self.accelerator.wait_for_everyone()
            return
        with together(self.accelerator, what):
            yield

    def load(self, path: Path, *, tied: str | None = None) -> dict[str, Any]:
        """Restores weights, optimizer and random states from ``path``; returns the saved state.

        Args:
            tied: why the run can only go on on as many processes as wrote it; None: it has no reason of its own.

        Raises: ConfigError if it is of another number of processes where that matters, or of other weights;
            TrainingError if a file is missing or damaged.
        """
        options: dict[str, Any] = {"load_module_strict": False} if self._deepspeed else {}
        state = read_state(path)
        check_processes(path, state["num_processes"], self.accelerator, tied)
        try:
            self.accelerator.load_state(str(path), **options)
            _check_random_state(path, self.accelerator.process_index, state["num_processes"])
        except _DAMAGED as error:
            raise TrainingError(
                f"the checkpoint {path} cannot be loaded: {' '.join(str(error).split())}. If it is damaged, "
                "delete that directory and run the same command: it goes on from the one before, if any"
            ) from error
        return state

    def intact(self, path: Path, *, step_back: bool) -> Path:
        """``path``, or the newest checkpoint before it whose every byte is what was written. A collective.

        What is damaged is kept beside them under another name.

        Args:
            step_back: False refuses a damaged one: it was asked for by name.

        Raises: TrainingError if there is none.
        """
        while problems := checkpoint_damage(self.accelerator, path):
            found = f"the checkpoint {path} is damaged ({'; '.join(problems[:3])})"
            if not step_back:
                raise TrainingError(
                    f"{found}. Restore it, or go on from another one: train.resume = auto takes the newest that "
                    "is intact"
                )
            aside = self._set_aside(path)
            newest = self.newest()
            if newest is None:
                raise TrainingError(
                    f"{found}, and there is no other one. It is kept as {aside}: restore it under its old name, "
                    "or run the same command to start afresh"
                )
            logger.warning(
                "%s; kept as %s. Going on from the one before: %s", found, aside, newest.name
            )
            path = newest
        if problems is None and self.accelerator.is_main_process:
            logger.warning("%s: an older version wrote it, without checksums: not verified", path)
        return path

    def _set_aside(self, path: Path) -> Path:
        """Renames a damaged checkpoint; nothing takes it for one any more, and nothing is lost."""
        names = [f"damaged-{path.name}", *(f"damaged-{path.name}-{n}" for n in range(2, 1000))]
        self.accelerator.wait_for_everyone()  # nobody reads it any more, and all see the same names
        aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with writing(path):
                path.rename(aside)
        self.accelerator.wait_for_everyone()
        return aside

    def load_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """This process's ``tensors`` of the checkpoint, empty if it saved none."""
        file = path / self._tensor_file
        return load_file(file) if file.is_file() else {}

    @property
    def _tensor_file(self) -> str:
        return f"reference-{self.accelerator.process_index}.safetensors"

    def path_of(self, step: int | None) -> Path:
        """Where the checkpoint of ``step`` is, or would be."""
        return self.root / f"step-{step}"

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        found = _complete(self.root)
        return found[-1] if found else None

    def newest_step(self) -> int | None:
        """The step of `newest`."""
        path = self.newest()
        return int(path.name.removeprefix("step-")) if path else None

    def _prune(self) -> None:
        if self.accelerator.is_main_process:
            for path in _complete(self.root)[: -self.keep]:
                if path != self.path_of(self.kept_step):
                    shutil.rmtree(path, ignore_errors=True)

    @property
    def _deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _save_options(self) -> dict[str, Any]:
        return {"exclude_frozen_parameters": True} if self._deepspeed else {}

    def _failure(self, step: int, error: Exception) -> str:
        previous = self.newest()
        kept = (
            f"the previous checkpoint {previous} is intact"
            if previous
            else "there is no earlier one"
        )
        return (
            f"the checkpoint of step {step} could not be written to {self.root} ({_free_space(self.root)}): "
            f"{error}; {kept}. Free space and run the same command to go on"
        )


def oldest_checkpoint(root: Path) -> int | None:
    """The step of the oldest complete checkpoint under ``root``: the furthest a kill can send a run back."""
    found = _complete(root)
    return int(found[0].name.removeprefix("step-")) if found else None


def _check_random_state(checkpoint: Path, rank: int, written_by: int) -> None:
    """Raises if the random state that a process saved is not the one in force; a process more gets one of its own.

    accelerate 1.15 goes on with whatever state there is when it cannot read the saved one, and says nothing.
    """
    path = checkpoint / f"random_states_{rank if rank < written_by else 0}.pkl"
    states = load_file_of_accelerate(path)
    if (
        rank >= written_by
    ):  # what dropout draws there differs from the others, and from the run's first steps
        torch.set_rng_state(states["torch_manual_seed"])
        set_seed(int(torch.randint(2**31, ()).item()) + rank)
        return
    if not torch.equal(states["torch_manual_seed"], torch.get_rng_state()):
        raise ValueError(f"{path.name}: the random state could not be restored")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a lost permission raises into a TrainingError that says how to go on."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise TrainingError(
            f"{path} cannot be written ({_free_space(path)}): {error}. Free space and run the same command: "
            "it goes on from the newest checkpoint"
        ) from error


def _free_space(root: Path) -> str:
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB free there"


def _complete(root: Path) -> list[Path]:
    return list(complete_checkpoints(root).values())


def _publish(temporary: Path, final: Path) -> None:
    """Flushes every file of a finished checkpoint to disk, then renames it into place."""
    for file in temporary.rglob("*"):
        if file.is_file():
            by_umask(file)
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name: parameters that require gradients."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _keep_trainable(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
    """accelerate's save hook: stores the trainable weights instead of the whole model."""
    weights.clear()
    for model in models:
        weights.append({n: t.contiguous() for n, t in trainable_state(_unwrap(model)).items()})


def _load_trainable(models: list[nn.Module], input_dir: str) -> None:
    """accelerate's load hook: loads what `_keep_trainable` stored, and nothing less."""
    while models:  # what is left in the list, accelerate would load by itself, strictly
        model = _unwrap(models.pop())
        saved = load_file(Path(input_dir) / "model.safetensors")
        wanted = trainable_state(model)
        found, due = ({(n, t.shape) for n, t in tensors.items()} for tensors in (saved, wanted))
        odd = sorted(name for name, _ in found ^ due)
        if odd:
            raise ConfigError(
                f"train.resume: {input_dir} holds other weights than this recipe trains (e.g. {odd[0]}); the "
                "model or the peft section changed. Restore it, or start afresh in another run.output_dir"
            )
        for name, tensor in saved.items():
            wanted[name].copy_(tensor)


def _unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)
