"""Where weights come from: a directory or hub id, resolved to files, adapters traced to their base."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from prefopt.errors import ModelError
from prefopt.model.hashing import model_hash, weights_hash
from prefopt.storage.model_files import (
    ADAPTER_CONFIG,
    BASE_FILE,
    read_adapter_config,
    read_base_record,
    read_model_config,
)

# What transformers, safetensors and huggingface_hub raise for weights that are absent, damaged or foreign.
LOAD_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError, EOFError,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where weights come from: a full model and the adapters on it, innermost first."""

    name: str
    """Of the full model: hub id or absolute path."""
    revision: str | None
    directory: Path
    """Of the full model, in the hub's cache if it has a hub id."""
    adapters: tuple[Path, ...] = ()

    @property
    def content(self) -> str:
        """Names the weights by what the files hold, whatever dtype they are loaded in."""
        if not self.adapters:
            return model_hash(self.directory)
        return weights_hash(
            self.directory, self.adapters, dtype="any", num_merged=len(self.adapters)
        )

    @property
    def from_the_top(self) -> tuple[Path, ...]:
        """Its directories, the topmost adapter first and the full model last."""
        return (*reversed(self.adapters), self.directory)

    def below(self, number: int) -> Source:
        """This source with the innermost ``number`` adapters only."""
        return dataclasses.replace(self, adapters=self.adapters[:number])


def resolve_source(path: str, revision: str | None = None) -> Source:
    """Finds the full model and the chain of adapters behind a path or hub id.

    Raises: ModelError if ``path`` is neither a model nor an adapter, or an adapter's base is not found.
    """
    adapters: list[Path] = []
    while True:
        config = adapter_config_file(path, revision)
        if config is None:
            break
        directory = fetch(path, revision, config.name).parent
        if directory in adapters:
            raise ModelError(f"the adapter {directory} names itself as its base")
        adapters.insert(0, directory)
        settings = read_adapter_config(directory, file=config)
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        if not base:
            raise ModelError(f"{config}: base_model_name_or_path is missing: the base is unknown")
        path = str(base)
    try:
        directory = fetch(path, revision, "config.json").parent
    except ModelError as error:
        if not adapters:
            raise
        raise ModelError(
            f"{adapters[0]} is an adapter, and its base is not there: {error}. Bring the base back, or set "
            f"base_model_name_or_path in {adapters[0] / ADAPTER_CONFIG} to where it is now"
        ) from error
    name = str(directory) if Path(path).is_dir() else path
    return Source(name, revision, directory, tuple(adapters))


def load_config(source: Source, *, trust_remote_code: bool) -> Any:
    """The configuration of a full model.

    Raises: ModelError if it cannot be read, or has code of its own that nobody has trusted.
    """
    try:
        return AutoConfig.from_pretrained(
            source.name, revision=source.revision or "main", trust_remote_code=trust_remote_code
        )
    except LOAD_ERRORS as error:
        if not trust_remote_code and "auto_map" in read_model_config(source.directory):
            raise ModelError(
                f"the model {source.name!r} comes with code of its own. Read it, and where you trust it set "
                "model.trust_remote_code = true (`prefopt merge`: --trust-remote-code)"
            ) from error
        raise ModelError(
            f"cannot load the model {source.name!r}: {type(error).__name__}: {first_line(error)}"
        ) from error


def check_adapter_base(adapter: Path, base: Source, path: str) -> None:
    """Returns if ``adapter`` was trained on ``base``: by content where it was recorded, else by name.

    Args:
        base: what the adapter is about to be put on.
        path: what the recipe calls it.

    Raises: ModelError "an adapter for another base".
    """
    settings = read_adapter_config(adapter)
    name = str(settings.get("base_model_name_or_path"))
    record = adapter / BASE_FILE
    if record.is_file():
        matches = read_base_record(adapter)["hash"] == base.content
        advice = "Its files are not those the adapter was trained on"
    else:
        matches = name in (path, base.name) or _same_model(name, base)
        advice = (
            "If they are one model under two names, set base_model_name_or_path in "
            f"{adapter / ADAPTER_CONFIG} to {path!r}"
        )
    if not matches:
        raise ModelError(
            f"{str(adapter)!r} is an adapter for another base: it was trained on {name!r}, this is {path!r}. "
            f"{advice}. Set model.path to the adapter's base."
        )


def _same_model(name: str, base: Source) -> bool:
    """True if the directory ``name`` is ``base``, or holds the same files."""
    directory = Path(name).expanduser()
    if not directory.is_dir():
        return False
    if directory.resolve() == (base.adapters[-1] if base.adapters else base.directory):
        return True
    try:
        return resolve_source(name).content == base.content
    except ModelError:  # a directory without weights proves nothing
        return False


def adapter_config_file(path: str, revision: str | None) -> Path | None:
    """The adapter configuration of a directory or hub repository, or None if it holds none."""
    try:
        found = find_adapter_config_file(path, revision=revision)
    except LOAD_ERRORS:
        return None  # not there at all: `fetch` says so
    return Path(found) if found else None


def fetch(path: str, revision: str | None, file: str) -> Path:
    """A file of a local directory (absolute) or of a hub repository (in the hub's cache).

    Raises: ModelError if it is not there.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / file).is_file():
            return (local / file).resolve()
        raise ModelError(
            f"{path!r} holds neither a model (config.json) nor an adapter (adapter_config.json)"
        )
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ModelError(f"model {path!r}: no such directory")
    try:
        found = cached_file(path, file, revision=revision or "main")
    except LOAD_ERRORS as error:
        raise ModelError(
            f"model {path!r}: no such local directory, and not to be had from the hub: {first_line(error)}"
        ) from error
    assert found is not None  # cached_file raises for a missing entry
    return Path(found)


def first_line(error: Exception) -> str:
    """The start of a library's message: some run over a screen."""
    return str(error).strip().split("\n")[0][:300]
