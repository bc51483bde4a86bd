"""From a recipe's ``peft`` section to the configuration object of its peft type."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.schema import PeftSection


def peft_config(section: PeftSection) -> PeftConfig:
    """The peft configuration of a recipe's section, its keys passed through and checked against the type.

    Raises: ConfigError, all problems at once: unknown type or key (nearest name given), wrong value,
        or a type that does not fit log-prob training.
    """
    types = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config_class = types.get(section.type.lower())
    if config_class is None:
        raise ConfigError(f"peft.type = {section.type!r}: unknown; {suggest(section.type, types)}")
    if issubclass(config_class, PromptLearningConfig):
        raise ConfigError(
            f"peft.type = {section.type!r}: adds virtual tokens to the prompt, which token log-probs and "
            "shared prompts do not have; use an adapter type such as 'lora'"
        )
    if section.type.lower() == "adalora":
        raise ConfigError(
            "peft.type = 'adalora': prunes its ranks between optimizer steps, which this trainer does not "
            "call for, so it would train at its initial rank; use 'lora'"
        )
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    problems = [
        f"peft.{key}: not a setting of type {section.type!r}; {suggest(key, fields)}"
        for key in section.options
        if key not in fields
    ]
    if str(section.options.get("init_lora_weights")).startswith("pissa_niter"):
        # measured: reloading redraws the random SVD, and the logits of a tiny Llama move by 5
        problems.append(
            "peft.init_lora_weights: 'pissa_niter_…' splits the base by a random SVD that reloading the "
            "adapter does not repeat: what is saved would not be what was trained. Use 'pissa' (exact SVD)"
        )
    if problems:
        raise ConfigError(problems)
    options = {"task_type": "CAUSAL_LM", **section.options}
    if "target_modules" in fields:
        options.setdefault("target_modules", "all-linear")
    try:
        return config_class(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"peft (type {section.type!r}): {error}") from error
