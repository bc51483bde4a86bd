"""An engine for a policy as it lies on disk: nothing is trained, nothing is pushed, nothing is merged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig

from prefopt.engines.base import Engine, PolicyFiles
from prefopt.engines.hf import HFEngine
from prefopt.engines.start import start_vllm
from prefopt.engines.vllm.settings import ServedModel
from prefopt.errors import ConfigError, EngineError, ModelError
from prefopt.model.adapters import ADAPTER_CONFIG
from prefopt.model.source import LOAD_ERRORS, Source, first_line, resolve_source
from prefopt.recipe.schema import EngineSection, ModelSection


def saved_policy_engine(
    section: EngineSection,
    policy: ModelSection,
    *,
    pad_id: int,
    max_model_len: int,
    device: str,
    log_dir: Path,
) -> tuple[Engine, int | None]:
    """The engine, serving ``policy`` as version 0, and its context in tokens (None: no limit known).

    Args:
        section: which engine, and how.
        policy: a full model or one adapter on a full model.
        pad_id: any token id; ``hf`` pads with it.
        max_model_len: longest prompt + response wanted; the model's own context bounds it.
        device: torch device of ``hf``.
        log_dir: where a server writes its log.

    Raises: ModelError for files that are not there; ConfigError for an adapter that vLLM cannot serve;
        EngineError if it does not start.
    """
    if section.name == "hf":
        engine = HFEngine.load(
            policy,
            None,
            seed=0,
            pad_id=pad_id,
            device=device,
            batch_size=section.batch_size,
            dtype=None if section.dtype == "auto" else getattr(torch, section.dtype),
            timeout_s=section.timeout_s,
        )
        return engine, engine.context
    source = resolve_source(policy.path, policy.revision)
    served = _served(section, policy, source, max_model_len)
    vllm = start_vllm(section, served, log_dir)
    for adapter in source.adapters:  # one at most: `_lora_rank` has refused more
        try:
            vllm.load_policy(PolicyFiles(0, adapter, is_adapter=True))
        except EngineError:
            vllm.close()
            raise
    return vllm, served.max_model_len


def _served(
    section: EngineSection, policy: ModelSection, source: Source, max_model_len: int
) -> ServedModel:
    try:
        config = AutoConfig.from_pretrained(
            source.name,
            revision=source.revision or "main",
            trust_remote_code=policy.trust_remote_code,
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"model {policy.path!r}: {first_line(error)}") from error
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    # vLLM scores with one token more than asked for, so the context is one short of the model's.
    return ServedModel(
        source.name,
        _dtype(section, policy, config),
        int(min(max_model_len, context - 1 if context else math.inf)),
        context=context,
        revision=source.revision,
        trust_remote_code=policy.trust_remote_code,
        lora_rank=_lora_rank(section, policy, source),
    )


def _dtype(section: EngineSection, policy: ModelSection, config: object) -> str:
    for wanted in (section.dtype, policy.dtype):
        if wanted != "auto":
            return wanted
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _lora_rank(section: EngineSection, policy: ModelSection, source: Source) -> int | None:
    """The largest rank of the policy's adapter. Raises: ConfigError if vLLM cannot serve it."""
    if not source.adapters:
        return None
    adapter, *others = source.adapters
    if others:
        raise ConfigError(
            f"engine.name = {section.name}: {policy.path!r} is an adapter on an adapter, and vLLM puts one on a "
            f"full model. Run `prefopt merge {policy.path} --output MERGED` and evaluate MERGED, or set "
            "engine.name=hf"
        )
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    odd = [name for name in ("use_dora", "modules_to_save") if settings.get(name)]
    odd += ["bias"] if settings.get("bias", "none") != "none" else []
    kind = str(settings.get("peft_type")).lower()
    if kind != "lora" or odd:
        raise ConfigError(
            f"engine.name = {section.name}: the adapter {policy.path!r} is {kind}"
            f"{' with ' + odd[0] if odd else ''}, and vLLM serves plain LoRA. Set engine.name=hf, or run "
            "`prefopt merge`"
        )
    return max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
