"""The few places where one process, DDP, DeepSpeed and FSDP differ."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
)
from torch import Tensor, nn

from prefopt.errors import ConfigError

# The shortest default of the collectives we meet (NCCL's).
_COLLECTIVE_TIMEOUT_S = 600.0


@contextlib.contextmanager
def sync_gradients(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:
    """Gradients are exchanged (and DeepSpeed steps) in the last backward of a window only."""
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def clip_gradients(
    accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float | None
) -> Tensor | float:
    """The global gradient norm before clipping to ``max_norm`` (None: do not clip).

    DeepSpeed has clipped and stepped inside backward (its ``gradient_clipping`` is set from the recipe).
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm if max_norm is not None else torch.inf)
    return 0.0 if norm is None else norm


def process_group_options(longest_wait_s: float = 0.0) -> list[KwargsHandler]:
    """What `Accelerator` must be told about collectives: gloo for several processes without a GPU.

    Args:
        longest_wait_s: of a process for another outside training, e.g. for rollouts; the collectives' own
            timeout (10 minutes under NCCL) is raised above it.

    Left alone on a machine without one, accelerate 1.15 gives every process of a DeepSpeed launch rank 0
    of 1, and DeepSpeed then stops over its batch size.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    options: dict[str, Any] = {} if torch.cuda.is_available() else {"backend": "gloo"}
    if longest_wait_s > _COLLECTIVE_TIMEOUT_S:
        options["timeout"] = timedelta(seconds=longest_wait_s)
    return [InitProcessGroupKwargs(**options)] if options else []


def check_launch(accelerator: Accelerator) -> None:
    """Raises ConfigError if the launch asked for DeepSpeed or FSDP and accelerate set up something else.

    It does so without a word on CPU (accelerate 1.15): FSDP becomes DDP, and ACCELERATE_USE_CPU=true turns
    DeepSpeed off.
    """
    for name in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        asked = os.environ.get(f"ACCELERATE_USE_{name.value}", "false").lower() == "true"
        if asked and accelerator.distributed_type != name:
            found = accelerator.distributed_type.value
            raise ConfigError(
                f"accelerate launch: the configuration asks for {name.value}, accelerate set up {found} on "
                f"{accelerator.device}; use accelerate_configs/ddp.yaml there, or a GPU. DeepSpeed runs on "
                "CPU if ACCELERATE_USE_CPU is not set"
            )


def configure_deepspeed(accelerator: Accelerator, max_norm: float | None) -> None:
    """Hands the recipe's settings to DeepSpeed before it wraps the model; nothing to do without it.

    Accumulation stays 1 there: the trainer says itself which backward is the last of a window, and has
    divided the loss already.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    accelerator.gradient_accumulation_steps = 1
    if accelerator.mixed_precision != "no" and plugin.zero_stage >= 2:
        # By default the gradients of a window's micro-batches add up in the weights' dtype. (Stage 1 would take
        # another optimizer, whose checkpoints DeepSpeed's own converter does not read.)
        plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # unused by us; DeepSpeed insists on a number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,
    }


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The elementwise sum over all processes, on each of them."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


def max_over_processes(accelerator: Accelerator, value: float) -> float:
    """The largest of the processes' values."""
    gathered = accelerator.gather(torch.tensor([value], device=accelerator.device))
    assert isinstance(gathered, Tensor)
    return gathered.max().item()


def told_by_main(accelerator: Accelerator, *values: Any) -> list[Any]:
    """The main process's ``values`` (anything that pickles), on every process. A collective."""
    found = list(values)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found


def gathered_state(
    accelerator: Accelerator, model: nn.Module, names: set[str]
) -> dict[str, Tensor] | None:
    """Full CPU copies of the named parameters and buffers on the main process; None on the others.

    One tensor at a time, so that no process ever holds more than the result. Every process must call it.
    """
    result: dict[str, Tensor] = {}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(names):
        full = _full_tensor(tensors[name])
        if accelerator.is_main_process:
            result[name] = full.detach().to("cpu", copy=True)
    return result if accelerator.is_main_process else None


def _full_tensor(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):  # sharded by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    full = getattr(tensor, "full_tensor", None)  # a DTensor: sharded by FSDP2
    return full() if full is not None else tensor


_STOPPING = b"\nsaving and stopping after this step; Ctrl-C again stops at once, without saving\n"


class Interrupts:
    """Ctrl-C and SIGTERM as a request to save and stop after the current step, agreed by all processes.

    Says so at once, since a step may take a while. A second Ctrl-C stops without saving. Signal handlers
    are put back on exit.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: nothing to install
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Has any process been asked to stop? A collective where there are several."""
        if self.accelerator.num_processes == 1:
            return self._asked
        flag = torch.tensor([float(self._asked)], device=self.accelerator.device)
        return sum_over_processes(self.accelerator, flag).item() > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked and self.accelerator.is_main_process:
            # Not logging: the signal may have interrupted a write to the stream, which is not re-entrant.
            os.write(2, _STOPPING)
        self._asked = True
