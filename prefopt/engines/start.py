"""From a recipe's ``engine`` section to an engine; nothing is started before it is first used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from prefopt.engines.base import Engine
from prefopt.engines.hf import HFEngine
from prefopt.engines.process import HFSource, ProcessEngine
from prefopt.engines.vllm.hosts import FoundHost, Host, StartedHost
from prefopt.engines.vllm.local import VllmEngine
from prefopt.engines.vllm.server import VllmServers
from prefopt.engines.vllm.settings import ServedModel, engine_arguments, require_vllm
from prefopt.errors import ConfigError
from prefopt.model.load import LoadedPolicy
from prefopt.model.logps import unwrap_causal_lm
from prefopt.model.source import adapter_config_file, resolve_source
from prefopt.recipe.schema import EngineSection, ModelSection, PeftSection


def build_engine(
    section: EngineSection,
    *,
    model: ModelSection,
    peft: PeftSection | None,
    policy: LoadedPolicy,
    seed: int,
    pad_id: int,
    max_model_len: int,
    device: str,
    separate_process: bool,
    share_trainable: bool,
    log_dir: Path,
) -> Engine:
    """The engine of a recipe.

    Args:
        section: the recipe's ``engine`` section.
        model: the recipe's ``model`` section.
        peft: the recipe's ``peft`` section.
        policy: as loaded from these two; `hf` in this process generates with its very weights.
        seed: ``train.seed``: an engine that loads the policy itself draws the same new adapter.
        pad_id: any token id; `hf` pads with it.
        max_model_len: longest prompt + response in tokens.
        device: torch device of `hf`.
        separate_process: run `hf` in a process of its own, beside training.
        share_trainable: let `hf` generate with the weights in training, so that there is nothing to push.
        log_dir: where processes and servers write what they have to say.

    Raises: ConfigError for a policy that the engine cannot serve, or vLLM where it is not installed;
        EngineError for `hf` on a policy sharded by ZeRO-3 or FSDP.
    """
    if section.name != "hf":
        return start_vllm(section, served_model(section, model, policy, max_model_len), log_dir)
    if separate_process:
        return _hf_process(section, model, peft, seed, pad_id, device, log_dir)
    return HFEngine.sharing(
        policy.model,
        share_trainable=share_trainable,
        pad_id=pad_id,
        batch_size=section.batch_size,
        dtype=None if section.dtype == "auto" else getattr(torch, section.dtype),
        timeout_s=section.timeout_s,
    )


def start_vllm(section: EngineSection, served: ServedModel, log_dir: Path) -> Engine:
    """vLLM in process or as servers, whichever ``section`` names; it starts when it is first used.

    Raises: ConfigError where vLLM is not installed, or ``devices`` and ``num_servers`` disagree.
    """
    if section.name == "vllm":
        return _local(section, served)
    return _servers(section, served, log_dir)


def served_model(
    section: EngineSection, model: ModelSection, policy: LoadedPolicy, max_model_len: int
) -> ServedModel:
    """What vLLM must serve so that the policy's adapters, or its weights, can be put on it.

    Raises: ConfigError for an adapter that vLLM cannot serve.
    """
    causal_lm = unwrap_causal_lm(policy.model)
    config = causal_lm.config.get_text_config(decoder=True)
    source = resolve_source(model.path, model.revision)
    rank = None
    if isinstance(policy.model, PeftModel):
        rank = _lora_rank(section, policy.model)
        _refuse_adapter_below(section, policy.model)
    dtype = (
        str(causal_lm.dtype).removeprefix("torch.") if section.dtype == "auto" else section.dtype
    )
    return ServedModel(
        source.name,
        dtype,
        max_model_len,
        context=getattr(config, "max_position_embeddings", None),
        revision=source.revision,
        trust_remote_code=model.trust_remote_code,
        lora_rank=rank,
    )


def _hf_process(
    section: EngineSection,
    model: ModelSection,
    peft: PeftSection | None,
    seed: int,
    pad_id: int,
    device: str,
    log_dir: Path,
) -> ProcessEngine:
    source = HFSource(
        model,
        pad_id,
        peft=peft,
        seed=seed,
        device=device,
        dtype=None if section.dtype == "auto" else section.dtype,
        batch_size=section.batch_size,
        timeout_s=section.timeout_s,
        cpus=section.cpus,
    )
    return ProcessEngine(
        source,
        log_dir=log_dir,
        startup_timeout_s=section.startup_timeout_s,
        max_restarts=section.max_restarts,
    )


def _local(section: EngineSection, served: ServedModel) -> VllmEngine:
    require_vllm("vllm")
    return VllmEngine(
        engine_arguments(section, served, cuda=torch.cuda.is_available()),
        timeout_s=section.timeout_s,
        startup_timeout_s=section.startup_timeout_s,
        max_restarts=section.max_restarts,
    )


def _servers(section: EngineSection, served: ServedModel, log_dir: Path) -> VllmServers:
    hosts: list[Host] = [
        FoundHost(url, startup_timeout_s=section.startup_timeout_s) for url in section.urls
    ]
    if not hosts:
        require_vllm("vllm_server")
        arguments = engine_arguments(section, served, cuda=torch.cuda.is_available())
        hosts += [
            StartedHost(
                arguments,
                log=log_dir / f"vllm-server-{number}.log",
                startup_timeout_s=section.startup_timeout_s,
                max_restarts=section.max_restarts,
                environment=environment,
            )
            for number, environment in enumerate(_device_environments(section))
        ]
    return VllmServers(
        hosts,
        model=served.path,
        timeout_s=section.timeout_s,
        max_model_len=served.max_model_len,
    )


def _device_environments(section: EngineSection) -> list[dict[str, str]]:
    if not section.devices:
        return [{} for _ in range(section.num_servers)]
    if len(section.devices) != section.num_servers:
        raise ConfigError(
            f"engine.devices = {list(section.devices)}: names the GPUs of {len(section.devices)} servers, and "
            f"engine.num_servers = {section.num_servers}. Give one entry a server, e.g. ['6', '7']"
        )
    return [{"CUDA_VISIBLE_DEVICES": devices} for devices in section.devices]


def _lora_rank(section: EngineSection, policy: PeftModel) -> int:
    """The largest rank of the adapter. Raises: ConfigError if vLLM cannot serve its kind."""
    config: Any = policy.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    odd = [name for name in ("use_dora", "modules_to_save") if getattr(config, name, None)]
    if kind != "lora" or odd or getattr(config, "bias", "none") != "none":
        setting = f"peft.type = {kind}" if kind != "lora" else f"peft.{odd[0] if odd else 'bias'}"
        raise ConfigError(
            f"{setting} with engine.name = {section.name}: vLLM serves plain LoRA adapters (without DoRA, bias "
            "or modules_to_save). Use such a one, or set engine.name = hf"
        )
    return max([config.r, *config.rank_pattern.values()])


def _refuse_adapter_below(section: EngineSection, policy: PeftModel) -> None:
    config: Any = policy.peft_config["default"]
    base = config.base_model_name_or_path
    if base and adapter_config_file(base, config.revision) is not None:
        raise ConfigError(
            f"model.path with engine.name = {section.name}: the policy's adapter sits on another adapter "
            f"({base}), and vLLM puts one on a full model. Run `prefopt merge {base} MERGED` and set "
            "model.path = MERGED"
        )
