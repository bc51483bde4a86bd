"""Names in a peft configuration that no module has: peft takes what it finds and is silent of the rest."""

from __future__ import annotations

import re

from peft import PeftConfig
from torch import nn

from prefopt.errors import ConfigError, suggest


def check_names(model: nn.Module, config: PeftConfig) -> None:
    """Raises ConfigError for a module to adapt or train whole that ``model``, without the adapter, lacks.

    Lists alone: of a text, which is a pattern or a word of peft's own, peft says itself that nothing matches.
    """
    every = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(config, key, None)
        for end in () if wanted is None or isinstance(wanted, str) else sorted(wanted):
            # peft takes a module to adapt by whole parts of its name, one to save by any end of it
            start = "." if key == "target_modules" else ""
            if not any(name == end or name.endswith(f"{start}{end}") for name in every):
                last = {name.rpartition(".")[2] for name in every}
                known = {name for name in last if not name.isdecimal()}
                raise ConfigError(
                    f"peft.{key}: no module of the model is called {end!r}; {suggest(end, known)}"
                )


def check_patterns(model: nn.Module, config: PeftConfig) -> None:
    """Raises ConfigError for a rank or a scale of modules that the adapter on ``model`` is not on."""
    names = [name for name, each in model.named_modules() if hasattr(each, "base_layer")]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                last = sorted({name.rpartition(".")[2] for name in names})
                raise ConfigError(
                    f"peft.{key}.{pattern}: no module that the adapter is put on is called so, and it would be "
                    f"ignored; it is on {', '.join(last)}"
                )
