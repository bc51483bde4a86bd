"""What vLLM must serve so that a policy's adapters, or its weights, can be put on it; the rest is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import AutoConfig

from prefopt.engines.base import Engine, PolicyFiles
from prefopt.engines.start import InTraining, Started, Task
from prefopt.engines.vllm.settings import ServedModel
from prefopt.errors import ConfigError, EngineError, ModelError
from prefopt.model.logps import unwrap_causal_lm
from prefopt.model.source import (
    LOAD_ERRORS,
    Source,
    adapter_config_file,
    first_line,
    resolve_source,
)
from prefopt.recipe.schema import VllmKeys
from prefopt.storage.checksums import check_weights
from prefopt.storage.model_files import read_adapter_config


def served_model(section: VllmKeys, task: Task) -> ServedModel:
    """What vLLM serves for a task. Raises: ConfigError for an adapter that it cannot serve; ModelError."""
    source = resolve_source(task.model.path, task.model.revision)
    wanted = section.max_model_len or task.max_model_len
    if task.training is not None:
        config: Any = unwrap_causal_lm(task.training.policy.model).config
        rank = _rank_in_training(section.name, task.training)
        dtype = task.training.policy.saved_dtype
    else:
        for directory in (source.directory, *source.adapters):  # vLLM looks at no checksum
            check_weights(directory)
        config = _saved_config(task, source)
        rank = _saved_rank(section.name, task, source)
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = own if task.model.dtype == "auto" else task.model.dtype
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if task.training is None:
        # vLLM scores with one token more than asked for, so the context is one short of the model's.
        wanted = int(min(wanted, context - 1 if context else math.inf))
    return ServedModel(
        source.name,
        dtype if section.dtype == "auto" else section.dtype,
        wanted,
        context=context,
        vocab_size=getattr(text, "vocab_size", None),
        revision=source.revision,
        trust_remote_code=task.model.trust_remote_code,
        lora_rank=rank,
    )


def started(engine: Engine, task: Task, served: ServedModel) -> Started:
    """The engine with the adapter of a saved policy put on it. Raises: EngineError if it does not start."""
    if task.training is None:
        source = resolve_source(task.model.path, task.model.revision)
        for adapter in source.adapters:  # one at most: `_saved_rank` has refused more
            try:
                engine.load_policy(PolicyFiles(0, adapter, is_adapter=True))
            except EngineError:
                engine.close()
                raise
    return Started(engine, served.max_model_len)


def _saved_config(task: Task, source: Source) -> Any:
    try:
        return AutoConfig.from_pretrained(
            source.name,
            revision=source.revision or "main",
            trust_remote_code=task.model.trust_remote_code,
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"model {task.model.path!r}: {first_line(error)}") from error


def _rank_in_training(name: str, training: InTraining) -> int | None:
    """The largest rank of the policy's adapter. Raises: ConfigError if vLLM cannot serve it."""
    if not isinstance(training.policy.model, PeftModel):
        return None
    config: Any = training.policy.model.peft_config["default"]
    kind, odd = _oddities(vars(config))
    if kind != "lora" or odd:
        setting = f"peft.type = {kind}" if kind != "lora" else f"peft.{odd[0]}"
        raise ConfigError(
            f"{setting} with engine.name = {name}: vLLM serves plain LoRA adapters (without DoRA, bias or "
            "modules_to_save). Use such a one, or set engine.name = hf"
        )
    base = config.base_model_name_or_path
    if base and adapter_config_file(base, config.revision) is not None:
        raise ConfigError(
            f"model.path with engine.name = {name}: the policy's adapter sits on another adapter ({base}), and "
            f"vLLM puts one on a full model. Run `prefopt merge {base} MERGED` and set model.path = MERGED"
        )
    return max([config.r, *config.rank_pattern.values()])


def _saved_rank(name: str, task: Task, source: Source) -> int | None:
    """As `_rank_in_training`, of the adapter that ``model.path`` is."""
    if not source.adapters:
        return None
    path, (adapter, *others) = task.model.path, source.adapters
    if others:
        raise ConfigError(
            f"engine.name = {name}: {path!r} is an adapter on an adapter, and vLLM puts one on a full model. Run "
            f"`prefopt merge {path} --output MERGED` and evaluate MERGED, or set engine.name=hf"
        )
    settings = read_adapter_config(adapter)
    kind, odd = _oddities(settings)
    if kind != "lora" or odd:
        raise ConfigError(
            f"engine.name = {name}: the adapter {path!r} is {kind}{' with ' + odd[0] if odd else ''}, and vLLM "
            "serves plain LoRA. Set engine.name=hf, or run `prefopt merge`"
        )
    return max([settings["r"], *(settings.get("rank_pattern") or {}).values()])


def _oddities(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The kind of an adapter, and its settings that vLLM has nothing for."""
    kind = config.get("peft_type")
    odd = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
    odd += ["bias"] if (config.get("bias") or "none") != "none" else []
    return str(getattr(kind, "value", kind)).lower(), odd
