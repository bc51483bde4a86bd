"""Data: rows of any shape to token ids, cached, mixed and split.

Every name loads on first use: reading rows needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.data.bundle import DataBundle, load_data
    from prefopt.data.prompts import PromptSet, load_prompts
    from prefopt.data.render import Renderer
    from prefopt.data.tokens import TokenSet

__all__ = ["DataBundle", "PromptSet", "Renderer", "TokenSet", "load_data", "load_prompts"]

_MODULES = {
    "DataBundle": "bundle",
    "load_data": "bundle",
    "PromptSet": "prompts",
    "load_prompts": "prompts",
    "Renderer": "render",
    "TokenSet": "tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'prefopt.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prefopt.data.{_MODULES[name]}"), name)
