"""Everything that can be known about a recipe before a model loads or a GPU is touched, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import ConfigError
from prefopt.recipe.checks import (
    advice,
    data,
    evaluation,
    files,
    peft,
    rollouts,
    samples,
    settings,
    stages,
    used_directory,
)
from prefopt.recipe.checks.rules import Surroundings, apply_rules
from prefopt.recipe.load import Draft, draft_recipe
from prefopt.recipe.schema import Recipe
from prefopt.recipe.yaml_file import Document

__all__ = ["check", "examine"]

# Importing a module of rules is what registers them; a new module of rules is one name here.
_RULE_MODULES = (
    settings, stages, data, samples, evaluation, files, peft, rollouts, used_directory, advice,
)  # fmt: skip


def check(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    num_processes: int | None = None,
    assume_cuda: bool = False,
) -> list[str]:
    """Returns notes about a recipe that can run: what was not checked, and what looks unusual.

    Args:
        recipe: the path of a YAML recipe, or a recipe already loaded (its problems then have no lines).
        overrides: ``section.key=value`` strings; only with a path.
        num_processes: processes the run will have, where known: the batch must divide over them.
        assume_cuda: check for a machine with CUDA, whatever this one has.

    Raises: ConfigError with every problem found: structure, settings that do not go together or would
        be ignored, files that are missing.
    """
    return examine(recipe, overrides, num_processes=num_processes, assume_cuda=assume_cuda)[1]


def examine(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    num_processes: int | None = None,
    assume_cuda: bool = False,
    to_train: bool = True,
) -> tuple[Recipe, list[str]]:
    """As `check`, and returns the validated recipe with the notes. Not ``to_train``: it is only looked at."""
    if isinstance(recipe, Recipe):
        draft = Draft(recipe, Document({}), (), frozenset())
        source = None
    else:
        draft = draft_recipe(recipe, overrides)
        source = str(recipe)
    problems, notes = apply_rules(draft, Surroundings(num_processes, assume_cuda, to_train))
    problems = [*draft.problems, *problems]
    if problems:
        raise ConfigError(problems, source=source)
    return draft.recipe, notes
