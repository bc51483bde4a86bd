"""From a recipe's ``peft`` section to the configuration object of its peft type."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.peft_unfit import unfit
from prefopt.recipe.schema import PeftSection

# Types that act on other modules than linear layers, or on a choice of them that their own defaults know.
_OWN_TARGETS = {"ia3", "ln_tuning", "trainable_tokens"}


def peft_config(section: PeftSection) -> PeftConfig:
    """The peft configuration of a recipe's section, its keys passed through and checked against the type.

    Raises: ConfigError, all problems at once: unknown type or key (nearest name given), wrong value,
        or what does not fit log-prob training (`prefopt.recipe.peft_unfit`).
    """
    kind = section.type.lower()
    types = {str(each.value).lower(): cls for each, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config_class = types.get(kind)
    if config_class is None:
        raise ConfigError(f"peft.type = {section.type!r}: unknown; {suggest(section.type, types)}")
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    problems = [
        f"peft.{key}: not a setting of type {section.type!r}; {suggest(key, fields)}"
        for key in section.options
        if key not in fields
    ]
    for key, why in unfit(kind, section.options.get, new=True):
        value = section.type if key == "type" else section.options[key]
        problems.append(f"peft.{key} = {value!r}: {why}")
    if problems:
        raise ConfigError(problems)
    options = {"task_type": "CAUSAL_LM", **section.options}
    if "target_modules" in fields and kind not in _OWN_TARGETS:
        options.setdefault("target_modules", "all-linear")
    try:
        return config_class(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"peft (type {section.type!r}): {error}") from error
