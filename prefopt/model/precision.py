"""In which dtypes a run keeps, computes and saves what it trains: decided here, once.

What trains is kept in float32. A bfloat16 number has 8 significant bits: at 0.02, the size of a weight, its
neighbours are 1e-4 away, and an AdamW step of 5e-7 rounds back to where it was, step after step. So weights
that come in half precision are widened when they are loaded to be trained, the forward computes in the dtype
they came in (autocast), and they are saved in it, rounded once. DeepSpeed and FSDP keep float32 masters of
their own under mixed precision; there nothing is widened.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

from prefopt.errors import ConfigError, ModelError
from prefopt.model.hashing import weight_files
from prefopt.model.source import LOAD_ERRORS, first_line, load_config, resolve_source
from prefopt.recipe.checks.settings import dtype_clash, half_weights
from prefopt.recipe.schema import ModelSection, Recipe

logger = logging.getLogger(__name__)

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The mixed precision that computes in a half dtype."""


def with_precision(recipe: Recipe, *, has_cuda: bool) -> Recipe:
    """The recipe with ``train.precision`` decided: `auto` is the dtype of the weights as they are loaded.

    Raises: ConfigError if the precision asked for does not go with frozen weights of that dtype; ModelError
        if there is no model.
    """
    model, train = recipe.model, recipe.train
    dtype = loaded_dtype(model)
    if dtype == torch.float16 and model.dtype == "auto" and not has_cuda:
        # Without a loss scaler (CUDA only) gradients underflow in float16.
        logger.info("model: saved as float16, which trains on CUDA only: loaded as float32 here")
        model, dtype = model.model_copy(update={"dtype": "float32"}), torch.float32
    precision = train.precision
    if precision == "auto":
        precision = PRECISIONS.get(dtype, "fp32")
        if model.quantization is not None and model.dtype == "auto":
            precision = "bf16"  # what the quantised layers compute in
    elif recipe.peft is not None and model.quantization is None:
        name = str(dtype).removeprefix("torch.")
        if clash := dtype_clash(name, precision):
            raise ConfigError(f"train.precision = '{precision}': {clash}")
    settings = train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"model": model, "train": settings})


def loaded_dtype(model: ModelSection) -> torch.dtype:
    """What ``model.dtype`` loads the weights in; `auto` as transformers takes it: from config, else files.

    Raises: ModelError if there is no model.
    """
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    source = resolve_source(model.path, model.revision)
    config = load_config(source, trust_remote_code=model.trust_remote_code)
    try:
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            first = weight_files(source.directory, "model.safetensors", "pytorch_model.bin")[0]
            dtype = get_state_dict_dtype(load_state_dict(str(first), map_location="meta"))
    except LOAD_ERRORS as error:
        raise ModelError(f"model {model.path!r}: {first_line(error)}") from error
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def keeps_masters(accelerator: Accelerator) -> bool:
    """Does the launch keep float32 masters of weights in half precision?"""
    if accelerator.mixed_precision == "no":
        return False
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        assert plugin is not None
        name = accelerator.mixed_precision
        section = plugin.deepspeed_config.get(name) or {}
        return not section.get(f"{name}_master_weights_and_grads", False)
    return accelerator.distributed_type == DistributedType.FSDP


def half_parameters(model: nn.Module) -> dict[str, torch.dtype]:
    """The parameters that train and are in half precision, with their dtypes."""
    return {n: p.dtype for n, p in model.named_parameters() if p.requires_grad and _is_half(p)}


def widen(model: nn.Module) -> None:
    """What trains, in float32: the same values, with room for an update."""
    for parameter in model.parameters():
        # ZeRO-3 may have sharded it while loading: DeepSpeed loads it in the dtype it trains in.
        if parameter.requires_grad and _is_half(parameter) and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()


def narrowed(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """``state`` with each tensor of ``dtypes`` rounded to the dtype it came in."""
    return {
        name: tensor.to(dtypes[name]) if name in dtypes else tensor
        for name, tensor in state.items()
    }


def refuse_half(model: nn.Module, *, masters_kept: bool) -> None:
    """Raises ConfigError for weights that train in half precision without float32 masters."""
    found = half_parameters(model)
    if found and not masters_kept:
        name, dtype = next(iter(found.items()))
        raise ConfigError(
            f"{len(found)} tensors would train in half precision, e.g. {name}: "
            + half_weights(str(dtype).removeprefix("torch."))
        )


def mixed_dtypes(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Autocast to the half dtype of a model whose weights are partly in float32, as training computes it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half = dtypes & PRECISIONS.keys()
    if len(half) != 1 or dtypes == half:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, half.pop())


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in PRECISIONS
