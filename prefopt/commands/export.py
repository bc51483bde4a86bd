"""The policy (or reward model) of a checkpoint, as a model or adapter that anything can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefopt.errors import ModelError, TrainingError
from prefopt.model.adapters import save_final
from prefopt.model.end_tokens import add_end_tokens, end_token_ids
from prefopt.model.load import load_tokenizer
from prefopt.recipe.schema import Recipe
from prefopt.storage.run_files import RUN_FILE, read_run
from prefopt.training.checkpoint import trainable_state
from prefopt.training.integrity import require_intact
from prefopt.wiring import load_trained

_PREFIX = "model."
"""The policy's place in `LogpModel` or `ScoreModel`, which is what checkpoints are of."""


def export_checkpoint(run_dir: Path, checkpoint: Path, output: Path) -> None:
    """Writes the weights of ``checkpoint`` to ``output``: an adapter where the run trained one, else the model.

    Args:
        run_dir: the run, with its ``run.json``.
        checkpoint: one of its ``checkpoints/step-N``, of one process, DDP or DeepSpeed.
        output: appears when it is complete and checked.

    Raises: ModelError for a checkpoint that is not of this run's recipe, or of a kind that only its own
        launcher reads (FSDP); TrainingError if it cannot be written.
    """
    recipe = _recipe(run_dir)
    require_intact(checkpoint)
    tokenizer = load_tokenizer(recipe.model)
    policy = load_trained(recipe, tokenizer)
    saved = _tensors(checkpoint)
    wanted = trainable_state(policy.model)
    odd = sorted(saved.keys() ^ wanted.keys())
    if odd:
        raise ModelError(
            f"{checkpoint}: holds other weights than {run_dir / RUN_FILE} trains ({len(odd)} differ, e.g. "
            f"{odd[0]!r}): one of them was moved or edited"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
    try:
        seen = read_run(run_dir, ModelError).get("data", {}).get("end_token_ids", ())
        add_end_tokens(policy.model, end_token_ids(tokenizer, seen))
        state = policy.to_save(dict(policy.model.named_parameters()))
        save_final(policy.model, tokenizer, output, state_dict=state)
    except OSError as error:
        raise TrainingError(f"{output}: cannot be written: {error}") from error


def _recipe(run_dir: Path) -> Recipe:
    record = read_run(run_dir, ModelError)
    try:
        # Leniently: what the recipe of another version had more is none of a policy's business.
        sections = {
            name: record["recipe"][name]
            for name in ("stage", "model", "data", "train", "run", "peft")
        }
        return Recipe.model_validate(sections)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{run_dir / RUN_FILE}: is no record of a run ({error!r})") from error


def _tensors(checkpoint: Path) -> dict[str, Any]:
    """Trained tensors by the policy's own names, fp32 where DeepSpeed keeps them so."""
    saved: Any
    file = checkpoint / "model.safetensors"
    if file.is_file():
        saved = load_file(file)
    elif (checkpoint / "pytorch_model").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        saved = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="pytorch_model")
    else:
        raise ModelError(
            f"{checkpoint}: neither model.safetensors nor DeepSpeed's pytorch_model/: checkpoints of FSDP are "
            "read by their own launcher only. Evaluate the run's final/ instead"
        )
    return {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()}
