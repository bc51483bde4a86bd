"""Preference optimisation for language models: any objective, any data regime, one trainer.

Importing this package imports neither torch nor vllm; every public name loads on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "load_recipe": "prefopt.recipe.load",
    "check": "prefopt.recipe.checks",
    "train": "prefopt.wiring",
    "objective": "prefopt.recipe.registry",
    "Need": "prefopt.recipe.registry",
    "Group": "prefopt.types",
    "Response": "prefopt.types",
    "ResponseLogps": "prefopt.types",
    "ObjectiveOutput": "prefopt.types",
    "PreferenceTrainer": "prefopt.training.trainer",
    "Engine": "prefopt.engines.base",
    "Signal": "prefopt.signals.base",
    "signal": "prefopt.recipe.registry",
    "per_response": "prefopt.signals.base",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
