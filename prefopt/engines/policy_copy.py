"""A second module of the trainer's policy to generate with: frozen weights shared, the rest its own.

The trainer's module runs packed attention, recomputes activations and is wrapped by DDP or DeepSpeed; none
of that may reach `generate`, and nothing that `generate` sets may reach the trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from prefopt.errors import EngineError, ModelError
from prefopt.model.adapters import check_loaded_adapter, load_saved_adapter, saved_tensors
from prefopt.model.attention import is_packed
from prefopt.model.load import load_base
from prefopt.model.logps import unwrap_causal_lm
from prefopt.model.source import resolve_source
from prefopt.recipe.schema import ModelSection


def generation_copy(
    policy: nn.Module,
    *,
    share_trainable: bool,
    half: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Any:
    """A module that generates with the policy's weights, without a second copy of those that are frozen.

    Args:
        policy: causal LM or PEFT model, not a wrapper around it.
        share_trainable: share the weights in training too: every optimizer step shows in the copy at once.
        half: dtypes of the weights in training as they are saved (`LoadedPolicy.half`), and so in a copy.

    Raises: EngineError if the parameters are sharded over processes (ZeRO-3, FSDP).
    """
    _refuse_sharded(policy)
    shared: list[Tensor] = [
        parameter
        for parameter in policy.parameters()
        if share_trainable or not parameter.requires_grad
    ]
    shared += policy.buffers()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for name, parameter in policy.named_parameters():
        if name in half and not share_trainable:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(half[name], copy=True))
    result: Any = copy.deepcopy(policy, memo)
    return prepared_for_generation(result)


def prepared_for_generation(model: Any) -> Any:
    """``model`` itself in eval mode, with ordinary attention and no setting of anyone's generation config."""
    model.eval()
    causal_lm = unwrap_causal_lm(model)
    if getattr(causal_lm, "is_gradient_checkpointing", False):
        causal_lm.gradient_checkpointing_disable()
    if is_packed(causal_lm.config._attn_implementation):
        _set_ordinary_attention(causal_lm)
    # `generate` fills what our configuration leaves open from this one: a repetition penalty, forced tokens
    causal_lm.generation_config = GenerationConfig()
    return model


def load_adapter_files(model: Any, directory: Path) -> PeftModel:
    """The model with the adapter saved in ``directory``, put on it or in place of its own.

    Raises: EngineError if the adapter is missing, damaged or does not fit.
    """
    try:
        if not isinstance(model, PeftModel):
            return load_saved_adapter(model, directory, trainable=False)
        set_peft_model_state_dict(model, dict(saved_tensors(directory)))
        check_loaded_adapter(model, directory)
    except (ModelError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise EngineError(f"cannot load the adapter {directory}: {error}") from error
    return model


def load_model_files(model: nn.Module, directory: Path, dtype: torch.dtype) -> None:
    """Copies the weights of a saved full model into ``model``.

    Read through transformers and not file by file: names on disk are not always those in memory.
    Raises: EngineError if they are missing, damaged or of another model.
    """
    own_code = isinstance(model, PreTrainedModel) and model.is_remote_code()  # it runs already
    section = ModelSection(
        path=str(directory), dtype=_dtype_name(dtype), trust_remote_code=own_code
    )
    try:
        saved = load_base(resolve_source(str(directory)), section)
    except ModelError as error:
        raise EngineError(f"cannot load the weights of {directory}: {error}") from error
    new, own = dict(saved.named_parameters()), dict(model.named_parameters())
    odd = sorted(new.keys() ^ own.keys())
    odd += [name for name in own.keys() & new.keys() if own[name].shape != new[name].shape]
    if odd:
        raise EngineError(f"{directory} holds another model: {len(odd)} differ, e.g. {odd[:2]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(new[name])


def _dtype_name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _set_ordinary_attention(causal_lm: Any) -> None:
    text_config = causal_lm.config.get_text_config(decoder=True)
    if getattr(text_config, "attn_logit_softcapping", None):
        causal_lm.set_attn_implementation("eager")  # SDPA drops the softcap: see `load_base`
        return
    try:
        causal_lm.set_attn_implementation("sdpa")
    except (ValueError, ImportError):  # an architecture without it
        causal_lm.set_attn_implementation("eager")


def _refuse_sharded(policy: nn.Module) -> None:
    for parameter in policy.parameters():
        sharded = "ZeRO-3" if hasattr(parameter, "ds_id") else None
        sharded = "FSDP" if hasattr(parameter, "full_tensor") else sharded
        if sharded:
            raise EngineError(
                f"engine.name = hf: the policy's parameters are sharded ({sharded}), and generating would "
                "gather every layer for every token. Set engine.name = vllm_server (or vllm), or train with "
                "ddp, zero1 or zero2"
            )
