"""Which script under ``recipes/`` trains a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.errors import ConfigError

if TYPE_CHECKING:
    from prefopt.recipe.schema import Recipe

RECIPE_SCRIPTS = {
    **{name: name for name in ("sft", "reward_model", "dpo", "simpo")},
    **dict.fromkeys(("a_lol", "a_lol_ref_free", "a_lol_seq", "a_lol_kl"), "a_lol"),
    **dict.fromkeys(
        ("filtered_nll", "rwr", "reward_conditioned", "wbc", "r_gold", "r_lol"), "offline_rl"
    ),
}
"""Stage or objective -> its script under ``recipes/``; preference.py takes the rest, and online_dpo.py every
recipe with rollouts, whatever its objective."""


def script_of(recipe: Recipe) -> str:
    """The script under ``recipes/`` that trains a recipe, without ``.py``."""
    if recipe.has_rollouts:
        return "online_dpo"
    found = recipe.objective.name if recipe.objective else recipe.stage
    return RECIPE_SCRIPTS.get(found, "preference")


def require_script(path: str, recipe: Recipe, trains: str) -> None:
    """Raises ConfigError if a recipe is given to the script of another regime, objective or stage."""
    right = script_of(recipe)
    if right == trains:
        return
    if "online_dpo" in (right, trains):
        takes = "rollouts" if trains == "online_dpo" else "a fixed data set"
        found = f"regime.name = '{recipe.regime.name}', and this script trains on {takes}"
    else:
        name = recipe.objective.name if recipe.objective else recipe.stage
        found = f"trains '{name}', and this script trains '{trains}'"
    raise ConfigError(f"{found}. Launch recipes/{right}.py", source=path)
