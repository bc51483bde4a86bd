"""What a run needs at its end, looked at before its first step: nobody wants to learn of it after the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from prefopt.model.distributed import decided_by_main
from prefopt.model.load import LoadedPolicy
from prefopt.model.precision import keeps_masters
from prefopt.model.rehearsal import rehearse_saving
from prefopt.recipe.schema import Recipe
from prefopt.training.room import check_room, needed_room


def check_ending(
    recipe: Recipe, policy: LoadedPolicy, tokenizer: Any, accelerator: Accelerator
) -> None:
    """Returns if the result can be saved, and there is room for it. A collective.

    Raises: ModelError for what cannot be saved, ConfigError for a place that cannot hold it, on every process.
    """
    masters = keeps_masters(accelerator)
    decided_by_main(accelerator, lambda: _check(recipe, policy, tokenizer, masters))


def _check(recipe: Recipe, policy: LoadedPolicy, tokenizer: Any, masters: bool) -> None:
    run_dir, train = Path(recipe.run.output_dir), recipe.train
    rehearse_saving(policy.model, tokenizer, run_dir)
    needed = needed_room(
        policy.model, train.optimizer, keeps_masters=masters, is_peft=policy.is_peft
    )
    check_room(run_dir, needed, train.keep_checkpoints)
