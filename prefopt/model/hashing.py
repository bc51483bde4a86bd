"""Names for weights: equal weights get equal names, whatever they are called and wherever they lie.

The name is the key of the reference store, so both mistakes are expensive: two names for one policy cost
a reference pass, one name for two policies gives a wrong loss that looks plausible.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from prefopt.errors import ModelError
from prefopt.storage.cache import atomic_write, cache_root
from prefopt.storage.model_files import read_adapter_config, read_model_config, shard_names

log = logging.getLogger(__name__)

# Configuration keys that do not touch the log-probs of given tokens (the dtype in force is hashed apart).
_CONFIG_IGNORED = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
_ADAPTER_CONFIG_IGNORED = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version",
    "revision", "runtime_config", "task_type",
)  # fmt: skip
# LoRA settings under which "every B is zero" implies "the adapter changes nothing, bit for bit". Any other
# setting away from its default (DoRA, layer replication, saved modules, …) is not assumed to be harmless.
_PLAIN_LORA = frozenset(
    (
        *_ADAPTER_CONFIG_IGNORED, "alpha_pattern", "bias", "exclude_modules", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "peft_type", "r",
        "rank_pattern", "target_modules", "target_parameters", "use_rslora",
    )
)  # fmt: skip
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")


def weights_hash(
    base: Path,
    adapters: Sequence[Path] = (),
    *,
    dtype: str,
    quantization: str | None = None,
    num_merged: int = 0,
    in_memory: str | None = None,
    cache_dir: str | Path | None = None,
) -> str:
    """The name of a policy's weights as loaded: 64 hex digits.

    Args:
        base: directory of the full model.
        adapters: adapter directories on top of it, innermost first.
        dtype: what the base is loaded in: bfloat16 weights give other log-probs than their fp32 originals.
        quantization: ``4bit``, ``8bit`` or None.
        num_merged: how many of ``adapters`` are merged into the base; merging rounds.
        in_memory: `state_hash` of an adapter that is not in a file.

    Raises: ModelError if a directory has no weights or cannot be read.
    """
    parts = {
        "base": model_hash(base, cache_dir=cache_dir),
        "adapters": [adapter_hash(path, cache_dir=cache_dir) for path in adapters],
        "num_merged": num_merged,
        "dtype": dtype.removeprefix("torch."),
        "quantization": quantization,
        "in_memory": in_memory,
    }
    return _digest(parts)


def model_hash(directory: Path, *, cache_dir: str | Path | None = None) -> str:
    """Hash of a full model's directory: the weight files that would be loaded, configuration, custom code."""
    config = read_model_config(directory)
    files = weight_files(directory, "model.safetensors", "pytorch_model.bin")
    if "auto_map" in config:
        files += sorted(directory.glob("*.py"))
    kept = {key: value for key, value in config.items() if key not in _CONFIG_IGNORED}
    return _digest({"config": kept, "files": _file_hashes(files, cache_dir)})


def adapter_hash(directory: Path, *, cache_dir: str | Path | None = None) -> str:
    """Hash of an adapter's directory: its tensors and what its configuration does with them."""
    config = read_adapter_config(directory)
    files = weight_files(directory, "adapter_model.safetensors", "adapter_model.bin")
    return _digest({"config": _normal(config), "files": _file_hashes(files, cache_dir)})


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors in memory: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fresh_adapter_hash(model: PeftModel, adapter: str = "default") -> str | None:
    """None if the new adapter provably changes nothing, else a hash of its tensors and configuration.

    A plain LoRA starts with every B at zero, so the policy is the base exactly, and runs with other
    seeds and ranks share the base's reference log-probs. PiSSA, OLoRA and the like change base and
    adapter together; DoRA recomputes norms: those are named by what they hold.
    """
    if is_identity_lora(model, adapter):
        return None
    config = model.peft_config[adapter]
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return _digest({"config": _normal(config.to_dict()), "state": state_hash(state)})


def is_identity_lora(model: PeftModel, adapter: str = "default") -> bool:
    """True if the adapter is plain LoRA whose every product B·A is exactly zero."""
    if not _is_plain_lora(model.peft_config[adapter]):
        return False
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.r]
    factors = [_zero_factors(layer, adapter) for layer in layers]
    return bool(factors) and all(
        tensors and all(tensor.numel() and not tensor.any() for tensor in tensors)
        for tensors in factors
    )


def _is_plain_lora(config: PeftConfig) -> bool:
    if type(config) is not LoraConfig or config.init_lora_weights not in (True, "gaussian"):
        return False
    plain = LoraConfig()
    return all(
        getattr(config, field.name) == getattr(plain, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _PLAIN_LORA
    )


def _zero_factors(layer: LoraLayer, adapter: str) -> list[Tensor]:
    """The factors peft starts at zero: B and its bias of a linear layer, A of an embedding."""
    if adapter in layer.lora_embedding_A:
        return [layer.lora_embedding_A[adapter]]
    return list(layer.lora_B[adapter].parameters()) if adapter in layer.lora_B else []


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter configuration without what does not matter; sets (saved in any order) as sorted lists."""
    return {
        key: sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else str(value)
        for key, value in config.items()
        if key not in _ADAPTER_CONFIG_IGNORED and value not in (None, False, {}, [])
    }


def weight_files(directory: Path, *names: str) -> list[Path]:
    """The files `from_pretrained` would load: the first of ``names`` there is, or the shards of its index."""
    for name in names:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            return [directory / shard for shard in shard_names(index)]
    raise ModelError(
        f"{directory} has no weights: expected {' or '.join(names)} (or shards with an index)"
    )


def _file_hashes(files: Sequence[Path], cache_dir: str | Path | None) -> list[str]:
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        return list(pool.map(lambda path: file_hash(path, cache_dir=cache_dir), files))


def file_hash(path: Path, *, cache_dir: str | Path | None = None) -> str:
    """SHA-256 of a file's bytes, remembered in the cache by path, size and times.

    A large file of the hub's cache is a link to a blob that is named by its SHA-256: taken as it is.
    Raises: ModelError if the file cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        if path.is_symlink() and real.parent.name == "blobs" and _LFS_BLOB.fullmatch(real.name):
            return real.name
        stat = real.stat()
        # ctime moves with every write and cannot be set back, as mtime can (rsync, cp -p)
        identity = _digest([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        memo = cache_root(cache_dir) / "file-hashes" / identity
        if memo.is_file() and _LFS_BLOB.fullmatch(
            known := memo.read_text("utf-8", errors="replace")
        ):
            return known
        with real.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    # a file written this instant could change again within the clock's tick, unseen
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
        _remember(memo, found)
    return found


def _remember(memo: Path, value: str) -> None:
    try:
        with atomic_write(memo) as temporary:
            temporary.write_text(value, encoding="utf-8")
    except OSError as error:  # costs a second hash next time, nothing else
        log.debug("cannot remember a file hash in %s: %s", memo, error)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
