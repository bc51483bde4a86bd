"""From ``tasks.<name>.<key>`` settings to a task, every problem at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from eval.registry import TaskSpec, get_task
from prefopt.errors import ConfigError
from prefopt.recipe.entries import parameters
from prefopt.recipe.load import validated
from prefopt.recipe.yaml_file import Document


def make_task(
    name: str, options: Mapping[str, Any] | None = None, document: Document | None = None
) -> Any:
    """The task with its options bound; nothing is loaded yet.

    Raises: ConfigError for an unknown name (naming the nearest), or options that do not fit, all at once.
    """
    spec = get_task(name)
    problems = option_problems(spec, options or {}, document)
    if problems:
        raise ConfigError(problems)
    return spec.fn(**(options or {}))


def option_problems(
    spec: TaskSpec, options: Mapping[str, Any], document: Document | None = None
) -> list[str]:
    """What is wrong with a task's options, a sentence each."""
    place = ("tasks", spec.name)
    return list(validated(parameters(spec), dict(options), document, place=place).problems)


def has_option(name: str, option: str) -> bool:
    """Does the task take this option?"""
    return option in inspect.signature(get_task(name).fn).parameters
