"""Rules about a run directory that is in use already: of this run, or of another."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.errors import ConfigError
from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.run_directory import FINAL, Used, used_directory
from prefopt.recipe.schema import Recipe
from prefopt.storage.run_files import RUN_FILE

_KEY = "run.output_dir"


@rule(*Recipe.model_fields)
def directory_is_of_this_run(recipe: Recipe, surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.to_train:
        return
    try:
        used = used_directory(recipe)
    except ConfigError as error:
        yield from (Finding("", problem) for problem in error.problems)
        return
    if used is None:
        return
    if used.is_finished:
        yield Finding(
            _KEY,
            f"holds the run of these settings, {used.state}: nothing is left to train. Use another one to train "
            "anew",
            is_note=True,
        )
    else:
        yield from _findings(recipe, used)


def _findings(recipe: Recipe, used: Used) -> Iterator[Finding]:
    if used.checkpoint is None:
        what = "" if used.record is None else f" of a run that {used.state}"
        yield Finding(
            _KEY,
            f"holds the {FINAL}/{what}, and no checkpoint to go on from: it would be trained anew and written "
            "over. Use another one, or delete this one",
        )
        return
    if recipe.train.accept_changes:
        return
    if used.record is None:
        yield Finding(
            _KEY,
            f"{used.checkpoint} has no {RUN_FILE} beside it, so what made its weights is not known. Restore it, "
            "use another run.output_dir, or set train.accept_changes=true to go on all the same",
        )
    for change in used.changes:
        yield Finding(
            change.key, f"was {change.was_text} when the weights of {used.checkpoint} were made"
        )
    if used.changes:
        yield Finding(
            _KEY,
            f"holds a run of other settings (above), {used.state}: a start with these would go on from its "
            "weights. Put the settings back, use another run.output_dir, or set train.accept_changes=true to go "
            f"on with the new ones (history in {RUN_FILE} keeps both)",
        )
