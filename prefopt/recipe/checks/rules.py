"""What a rule is: a function from a recipe to findings, with the sections it reads declared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.recipe.explain import show_value
from prefopt.recipe.load import Draft
from prefopt.recipe.registry import Bound
from prefopt.recipe.schema import Recipe, Section, SourceSection

PROBE_PROMPTS = "eval.generation.prompts"


@dataclass(frozen=True)
class Finding:
    """One problem or note about one key."""

    key: str
    """Dotted key of the recipe, e.g. ``data.train.0.split``, shown with its value and its line; empty
    for a finding about none in particular."""
    text: str
    """What is required, why, and what to do."""
    is_note: bool = False
    """A note does not stop the run."""


@dataclass(frozen=True)
class Surroundings:
    """What a rule may know beside the recipe."""

    num_processes: int | None = None
    assume_cuda: bool = False
    to_train: bool = True
    """Is the recipe to be run, and not only looked at?"""

    @property
    def has_cuda(self) -> bool:
        """Is there a CUDA device, or are we told to suppose one?"""
        if self.assume_cuda:
            return True
        import torch

        return torch.cuda.is_available()

    @property
    def keeps_masters(self) -> bool:
        """Does the launch keep float32 masters of weights in half precision, under mixed precision?"""
        names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
        return any(os.environ.get(name, "false").lower() == "true" for name in names)


Rule = Callable[[Recipe, Surroundings], Iterator[Finding]]

_RULES: list[tuple[frozenset[str], Rule]] = []


def rule(*sections: str) -> Callable[[Rule], Rule]:
    """Registers a rule that reads only these top-level keys; it is passed over while one is broken."""

    def register(function: Rule) -> Rule:
        _RULES.append((frozenset(sections), function))
        return function

    return register


def named_sources(recipe: Recipe) -> Iterator[tuple[str, SourceSection]]:
    """Every source with its dotted key, training mixture first."""
    for name in ("train", "eval", "prompts"):
        for index, source in enumerate(getattr(recipe.data, name)):
            yield f"data.{name}.{index}", source
    if recipe.eval.generation is not None:
        for index, source in enumerate(recipe.eval.generation.prompts):
            yield f"{PROBE_PROMPTS}.{index}", source


def apply_rules(draft: Draft, surroundings: Surroundings) -> tuple[list[str], list[str]]:
    """Returns ``(problems, notes)`` of every rule whose sections are sound."""
    problems: list[str] = []
    notes: list[str] = []
    for sections, function in _RULES:
        if sections & draft.broken:
            continue
        try:
            findings = list(function(draft.recipe, surroundings))
        except ModuleNotFoundError as error:  # a rule about torch or peft, on a machine without it
            rule_name = function.__name__.replace("_", " ")
            notes.append(f"not checked, because {error.name} is not installed: {rule_name}")
            continue
        for finding in findings:
            text = _sentence(finding, draft)
            if text not in problems and text not in notes:
                (notes if finding.is_note else problems).append(text)
    return problems, notes


def was_set(section: Section, key: str) -> bool:
    """Does the recipe itself give this key (rather than leave it at its default)?"""
    return key in section.model_fields_set


def _sentence(finding: Finding, draft: Draft) -> str:
    if not finding.key:
        return finding.text
    path = tuple(int(part) if part.isdigit() else part for part in finding.key.split("."))
    value = _look_up(draft.recipe, path)
    shown = (
        "" if value is None or isinstance(value, Section | Mapping | tuple) else show_value(value)
    )
    middle = f" = {shown}" if shown else ""
    return f"{draft.document.origin(path)}{finding.key}{middle}: {finding.text}"


def _look_up(value: Any, path: tuple[str | int, ...]) -> Any:
    """The value at a key path, None where there is none."""
    for part in path:
        if isinstance(value, tuple):
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, Bound):
            value = value.given.get(str(part))
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = getattr(value, str(part), None)
    return value
