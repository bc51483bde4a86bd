"""A loaded model with its windows made short, so that a few tokens show what thousands would.

What lies beyond a window is where a layout goes wrong without a sign: log-probs of a short probe are right
whatever happens 4,096 tokens back. Windows are read while running, from the configuration by what builds masks
and from the layers by what attends; both are set here, and put back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

SHORT = 2
"""Tokens a window reaches inside; a probe's rows are longer."""

# Windows, chunks, and how many tokens a sparse attention picks: what acts only on rows longer than its number.
_NAMES = re.compile(
    r"window|attention_chunk|attn_chunk|local_attention|index_topk|indexer_budget|topk_blocks"
)
_OTHER = re.compile(r"layers|pattern|dropout|use_|every")


@contextlib.contextmanager
def short_windows(model: nn.Module) -> Iterator[dict[str, int]]:
    """The model with every window longer than `SHORT` cut to it; yields their names and lengths.

    Names are those of the configuration. Nothing is cut, and the result is empty, where it names no window longer
    than that.
    """
    owners: list[Any] = list(_configs(model))
    found = {
        name: max(_lengths(value))
        for owner in owners
        for name, value in vars(owner).items()
        if _is_window(name, value)
    }
    before = [
        (owner, name, value)
        for owner in [*owners, *model.modules()]
        for name, value in vars(owner).items()
        if found and _is_window(name, value)
    ]
    try:
        for owner, name, value in before:
            setattr(owner, name, _cut(value))
        yield found
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model, those inside others too, each once."""
    found: dict[int, Any] = {}
    waiting = [
        config for m in model.modules() if (config := getattr(m, "config", None)) is not None
    ]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "__dict__"):
            continue
        found[id(config)] = config
        waiting += [value for value in vars(config).values() if hasattr(value, "model_type")]
    return list(found.values())


def _is_window(name: str, value: Any) -> bool:
    named = _NAMES.search(name) is not None and _OTHER.search(name) is None
    return named and any(length > SHORT for length in _lengths(value))


def _lengths(value: Any) -> list[int]:
    """The whole numbers of a setting for all layers, or of one for each."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [part for part in parts if isinstance(part, int) and not isinstance(part, bool)]


def _cut(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cut(part) for part in value)
    is_length = isinstance(value, int) and not isinstance(value, bool)
    return min(value, SHORT) if is_length else value
