"""The JSON beside weights, of adapters and of full models, read where its shape is decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.errors import ModelError, PrefoptError
from prefopt.storage.reading import UnreadableError, load_json, reading

ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
BASE_FILE = "prefopt_base.json"
"""Beside a saved adapter: the content hash of the base it was trained on, which outlives every renaming."""

_ADAPTER = {
    "base_model_name_or_path": str, "revision": str, "peft_type": str, "task_type": str, "r": int,
    "rank_pattern": dict,
}  # fmt: skip
_ADVICE = "Restore the directory, or save the model again"


def read_adapter_config(
    directory: Path, error: type[PrefoptError] = ModelError, file: Path | None = None
) -> dict[str, Any]:
    """The settings of an adapter; what they lack or have as null is up to the reader.

    Args:
        file: where it lies, if not in ``directory`` under its usual name.
    """
    path = file or directory / ADAPTER_CONFIG
    with reading(path, "the configuration of an adapter", _ADVICE, error):
        return load_json(path, maybe=_ADAPTER)


def read_model_config(directory: Path, error: type[PrefoptError] = ModelError) -> dict[str, Any]:
    """The ``config.json`` of a full model."""
    path = directory / CONFIG
    with reading(path, "the configuration of a model", _ADVICE, error):
        return load_json(path, maybe={"architectures": list, "auto_map": dict})


def read_base_record(directory: Path) -> dict[str, Any]:
    """`BASE_FILE`: the ``hash`` of an adapter's base."""
    path = directory / BASE_FILE
    with reading(path, "the record of an adapter's base", _ADVICE, ModelError):
        return load_json(path, {"hash": str})


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names. Raises: ModelError."""
    with reading(index, "an index of weights", _ADVICE, ModelError):
        names = load_json(index, {"weight_map": dict})["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise UnreadableError("it names a file that is no text")
        return sorted(set(names))
