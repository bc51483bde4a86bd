"""Every checkpoint of a run, evaluated like the run itself: what a reward-versus-KL frontier is drawn from."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from eval.models import run_condition, run_recipe, run_trust
from eval.settings import EvalSettings
from prefopt.errors import ModelError
from prefopt.recipe.schema import ModelSection
from prefopt.storage.holder import held
from prefopt.storage.run_files import CHECKPOINTS, RUN_FILE, complete_checkpoints

logger = logging.getLogger("prefopt.eval")

_OF_TRL = re.compile(r"checkpoint-(\d+)")
POLICY_FOLDER = "policy"


def evaluate_checkpoints(settings: EvalSettings, names: Sequence[str], output: Path) -> None:
    """Evaluates every checkpoint into ``output/step-N``, oldest first, and prints a table each.

    Without a ``--baseline``, a fully fine-tuned run is compared with the model it started from, an adapter
    with its base.
    Raises: ModelError for what is no run or has no checkpoints; and as `eval.runner.evaluate`.
    """
    from eval.runner import evaluate
    from eval.show import print_results

    run_dir = Path(settings.model.path).expanduser()
    found = found_checkpoints(run_dir)
    with held(output, work="evaluation", advice="Another --output is free"):
        for step, checkpoint in found.items():
            folder = output / f"step-{step}"
            policy = _policy(run_dir, checkpoint, folder / POLICY_FOLDER)
            logger.info("step %d: %s", step, policy)
            update = {
                "model": settings.model.model_copy(
                    update={"path": str(policy), **run_trust(settings.model)}
                ),
                "baseline": settings.baseline or start_of(run_dir),
            }
            print_results(
                evaluate(settings.model_copy(update=update), names, folder), as_json=False
            )


def found_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Complete checkpoints by step, ascending. Raises: ModelError if there are none."""
    if not (run_dir / RUN_FILE).is_file():
        raise ModelError(
            f"{run_dir}: --checkpoints takes a run directory, and this holds no {RUN_FILE}"
        )
    root = run_dir / CHECKPOINTS
    found = complete_checkpoints(root)
    for path in root.iterdir() if root.is_dir() else ():
        if match := _OF_TRL.fullmatch(path.name):
            found.setdefault(int(match.group(1)), path)
    if not found:
        raise ModelError(
            f"{root}: holds no checkpoint. Train with train.save_every=N and train.keep_checkpoints=MANY"
        )
    return dict(sorted(found.items()))


def start_of(run_dir: Path) -> ModelSection | None:
    """The model a fully fine-tuned run started from; None for an adapter, whose base is its start."""
    recipe = run_recipe(str(run_dir))
    if recipe is None or recipe.get("peft") is not None:
        return None
    model = recipe["model"]
    section = ModelSection(path=model["path"], revision=model.get("revision"))
    trusted = bool(model.get("trust_remote_code"))
    return section.model_copy(update={"trust_remote_code": trusted})


def _policy(run_dir: Path, checkpoint: Path, folder: Path) -> Path:
    """A directory that holds the checkpoint's policy: itself where TRL saved it, else an export."""
    if (checkpoint / "config.json").is_file() or (checkpoint / "adapter_config.json").is_file():
        return checkpoint
    if not folder.is_dir():
        from prefopt.commands.export import export_checkpoint

        export_checkpoint(run_dir, checkpoint, folder)
    if run_condition(str(run_dir)) is not None:
        # Beside the export, as beside a run's final/: it says which reward its policy is asked for.
        shutil.copyfile(run_dir / RUN_FILE, folder.parent / RUN_FILE)
    return folder
