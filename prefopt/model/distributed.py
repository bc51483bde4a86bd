"""The few places where one process, DDP, DeepSpeed and FSDP differ."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from prefopt.errors import ConfigError, PrefoptError, TrainingError, in_words
from prefopt.process.launch import alone_on, launched, not_set_up
from prefopt.process.stopping import Stopped

_T = TypeVar("_T")

# A collective that times out names nobody. The ranks' own limit (`run.stuck_after_s`) comes before it, and before
# that whatever may take long: a checkpoint on slow storage, an hour.
_LONGEST_WAIT_S = 3600.0
_AFTER_THE_VERDICT_S = 300.0


@contextlib.contextmanager
def sync_gradients(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:
    """Gradients are exchanged (and DeepSpeed steps) in the last backward of a window only."""
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def clip_gradients(
    accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float | None
) -> Tensor | float | None:
    """The global gradient norm before clipping to ``max_norm`` (None: do not clip).

    None where nobody took it: DeepSpeed's plain optimizers (stage 0) take none. DeepSpeed has clipped and stepped
    inside backward (its ``gradient_clipping`` is set from the recipe).
    """
    return accelerator.clip_grad_norm_(parameters, max_norm if max_norm is not None else torch.inf)


def process_group_options(longest_wait_s: float = 0.0) -> list[KwargsHandler]:
    """What `Accelerator` must be told of several processes: gloo without a GPU, and not to wait for idle weights.

    Args:
        longest_wait_s: of a process for another outside training, e.g. for rollouts; the collectives' own
            timeout (10 minutes under NCCL) is raised above it.

    Left alone on a machine without one, accelerate 1.15 gives every process of a DeepSpeed launch rank 0
    of 1, and DeepSpeed then stops over its batch size. DDP left alone stops in the second step, or waits for ever,
    over weights that no text reaches: vision towers, an indexer that picks what to attend to, adapters on them.
    """
    if launched().world_size == 1:
        return []
    options: dict[str, Any] = {} if torch.cuda.is_available() else {"backend": "gloo"}
    longest = max(longest_wait_s, _LONGEST_WAIT_S) + _AFTER_THE_VERDICT_S
    options["timeout"] = timedelta(seconds=longest)
    idle = DistributedDataParallelKwargs(find_unused_parameters=True)
    return [InitProcessGroupKwargs(**options), idle]


def check_launch(accelerator: Accelerator) -> None:
    """Raises ConfigError if the processes are not what the launch asked for: their type, or their number.

    accelerate 1.15 changes both without a word on CPU: FSDP becomes DDP, ACCELERATE_USE_CPU=true turns DeepSpeed
    off, and without that variable the processes of DDP are each alone (`prefopt.process.launch` finds most of it
    earlier).
    That they exchange anything is not taken from what accelerate says of itself but tried. A collective.
    """
    found, size = accelerator.distributed_type, launched().world_size
    for name in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        asked = os.environ.get(f"ACCELERATE_USE_{name.value}", "false").lower() == "true"
        if asked and found != name:
            raise ConfigError(not_set_up(name.value, found.value, str(accelerator.device), size))
    ones = torch.ones(1, device=accelerator.device)
    if (added := int(sum_over_processes(accelerator, ones).item())) != size:
        raise ConfigError(alone_on(found.value, size, added))


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


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Models that transformers loads inside are whole, each on the process that loads it.

    Under ZeRO-3 it splits all that it loads over the processes of the launch: accelerate 1.15 tells it to,
    whatever ``zero3_init_flag`` says. That suits what trains, which all load together and DeepSpeed's engine
    gathers. A model beside it (a reference, a signal, a result that is read back) has no engine to gather it, and
    a process that loads one alone would wait for the others for ever.
    """
    from transformers.integrations import deepspeed as integration

    held = integration._hf_deepspeed_config_weak_ref
    config = held() if held is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The elementwise sum over all processes, on each of them."""
    total = accelerator.reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


def max_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """The largest of the processes' values, one by one. A collective where there are several."""
    if accelerator.num_processes == 1:
        return list(values)
    gathered = accelerator.gather(torch.tensor([values], device=accelerator.device))
    assert isinstance(gathered, Tensor)
    return gathered.amax(0).tolist()


def told_by_main(accelerator: Accelerator, *values: Any) -> list[Any]:
    """The main process's ``values`` (anything that pickles), on every process. A collective."""
    found = list(values)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found


def decided_by_main(accelerator: Accelerator, decide: Callable[[], _T]) -> _T:
    """What ``decide`` returns or raises (our own errors) on the main process, on every process. A collective."""
    found: Any = None
    error: PrefoptError | None = None
    if accelerator.is_main_process:
        try:
            found = decide()
        except PrefoptError as problem:
            error = problem
    found, error = told_by_main(accelerator, found, error)
    if error is not None:
        raise error
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


def raise_together(accelerator: Accelerator, error: BaseException | None, what: str) -> None:
    """Raises on every process if one of them failed at ``what``, so that none waits for it. A collective.

    Raises: the error itself where it arose; elsewhere TrainingError naming the rank, or `Stopped` for that. Both
        are on all ranks (`is_on_all_ranks`).
    """
    found = [_told(accelerator, error)]
    if accelerator.num_processes > 1:
        found = gather_object(found)
    failed = [each for each in found if each is not None]
    if error is None and failed:
        who, text, number = failed[0]
        error = (
            TrainingError(f"{what}: failed on {who}: {text}") if number is None else Stopped(number)
        )
    if error is not None:
        raise marked_on_all_ranks(error)


@contextlib.contextmanager
def together(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Work of some processes that the others wait for: what one raises, all raise. Ends in a collective."""
    error: BaseException | None = None
    try:
        yield
    except (Exception, Stopped) as problem:  # whatever it is, the others must not wait
        error = problem
    raise_together(accelerator, error, what)


def marked_on_all_ranks(error: BaseException) -> BaseException:
    """The error, known to be raised by every process at the same point: they can still work together."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Has every process raised it at this point?"""
    return getattr(error, "on_all_ranks", False)


def _told(
    accelerator: Accelerator, error: BaseException | None
) -> tuple[str, str, int | None] | None:
    if error is None:
        return None
    who = f"rank {accelerator.process_index} ({socket.gethostname()}, process {os.getpid()})"
    return who, in_words(error), error.number if isinstance(error, Stopped) else None
