"""One TRL stage from recipe to saved, verified model."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from prefopt.data import DataBundle, load_data
from prefopt.errors import ConfigError, TrainingError
from prefopt.model.adapters import save_final
from prefopt.model.distributed import Interrupts, gathered_state
from prefopt.model.load import check_vocabulary, load_policy, load_tokenizer
from prefopt.recipe.schema import Recipe
from prefopt.stages.arguments import BatchPlan, plan_batches, training_arguments
from prefopt.stages.callbacks import MetricsCallback, QuietProgress, RunCallback
from prefopt.stages.reward_model import load_reward_model
from prefopt.stages.rows import (
    preference_dataset,
    preference_row_tokens,
    sft_dataset,
    sft_row_tokens,
    with_rows,
)
from prefopt.stages.trainers import StageRewardTrainer, StageSFTTrainer
from prefopt.training.metrics import MetricsLog
from prefopt.training.run_record import git_commit, versions, warn_about_changes
from prefopt.types import Group

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class _Stage:
    """What differs between the two stages."""

    load_model: Callable[[Recipe, Any], Model]
    make_dataset: Callable[[Any], Dataset]
    row_tokens: Callable[[Group], int]
    trainer: type[StageSFTTrainer] | type[StageRewardTrainer]
    config: type[SFTConfig] | type[RewardConfig]
    options: dict[str, Any]
    """Settings only this stage's configuration class has."""


def run_stage(recipe: Recipe) -> Path:
    """Trains an ``sft`` or ``reward_model`` recipe with TRL and returns the run directory.

    SFT minimises the mean NLL over the response tokens of the global batch; a reward model
    -log σ(r(chosen) - r(rejected)), a mean over pairs. Rows are tokenised by our data layer, before any
    process group starts, and handed to TRL as they are. Called on every process of a launch, with a
    recipe that has passed `prefopt.recipe.checks.check`.

    Raises: ConfigError, DataError, ModelError before training; TrainingError during it;
        KeyboardInterrupt after an interrupted run has saved.
    """
    stage = _STAGES[recipe.stage]
    run_dir = Path(recipe.run.output_dir)
    resume_from = find_stage_checkpoint(run_dir, recipe.train.resume)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe.data, tokenizer, stage=recipe.stage)
    assert data.train is not None  # the check has seen to it
    sizes = [stage.row_tokens(data.train.group(index)) for index in range(len(data.train))]
    plan = plan_batches(recipe.train, sizes, num_processes=world_size())
    arguments = _arguments(
        stage, recipe, plan, has_eval=data.eval is not None, fresh=resume_from is None
    )
    # After the arguments: creating them sets up DeepSpeed, which ZeRO-3 must precede the weights.
    model = stage.load_model(recipe, tokenizer)
    check_vocabulary(model, tokenizer)
    trainer = _trainer(stage, recipe, data, model, tokenizer, arguments)
    if trainer.is_world_process_zero():
        _start_run_dir(run_dir, recipe, data, plan, trainer, resumed=resume_from is not None)
    _train(trainer, recipe, resume_from)
    _save_verified(trainer, tokenizer, run_dir / "final")
    if trainer.is_world_process_zero():
        logger.info("run directory: %s", run_dir)
    return run_dir


def world_size() -> int:
    """Processes of this launch, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_stage_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint ``train.resume`` asks for, or None to start afresh.

    transformers writes ``trainer_state.json`` last, so a checkpoint whose state reads is complete.
    Raises: ConfigError if a named one is not, or ``never`` meets the checkpoints of another run.
    """
    found = sorted(filter(_is_complete, (run_dir / "checkpoints").glob("checkpoint-*")), key=_step)
    if resume == "auto":
        return found[-1] if found else None
    if resume != "never":
        if not _is_complete(Path(resume)):
            raise ConfigError(
                f"train.resume = {resume}: not a complete checkpoint (no readable trainer_state.json); give "
                "a directory such as runs/x/checkpoints/checkpoint-100, or auto"
            )
        return Path(resume)
    if found:
        raise ConfigError(
            f"train.resume = never: {run_dir} holds a run with checkpoints up to {found[-1].name}; use "
            "another run.output_dir, delete it, or go on with train.resume = auto"
        )
    return None


def _load_policy(recipe: Recipe, tokenizer: Any) -> Model:
    return load_policy(recipe.model, recipe.peft, seed=recipe.train.seed).model


def _load_reward_model(recipe: Recipe, tokenizer: Any) -> Model:
    return load_reward_model(
        recipe.model, recipe.peft, seed=recipe.train.seed, pad_token_id=tokenizer.pad_token_id
    )


_STAGES = {
    "sft": _Stage(
        load_model=_load_policy,
        make_dataset=sft_dataset,
        row_tokens=sft_row_tokens,
        trainer=StageSFTTrainer,
        config=SFTConfig,
        # Labels are ours; preparation would only copy the data once more.
        options={"dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "reward_model": _Stage(
        load_model=_load_reward_model,
        make_dataset=preference_dataset,
        row_tokens=preference_row_tokens,
        trainer=StageRewardTrainer,
        config=RewardConfig,
        options={},
    ),
}


def _arguments(
    stage: _Stage, recipe: Recipe, plan: BatchPlan, *, has_eval: bool, fresh: bool
) -> TrainingArguments:
    """TRL's configuration. The recipe's precision wins over the launcher's, as for every other stage."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"fp32": "no"}.get(
        recipe.train.precision, recipe.train.precision
    )
    options = training_arguments(recipe, plan, has_eval=has_eval) | stage.options
    if stage.config is RewardConfig:
        options["disable_dropout"] = recipe.model.disable_dropout  # TRL's own default is True
    # The first step of a run is evaluated before, so that the curve has a start; a resumed run has one.
    options["eval_on_start"] = has_eval and fresh
    if world_size() > 1 and not torch.accelerator.is_available():
        # Without a name, DeepSpeed on CPU gets no process group and every process trains by itself.
        options["ddp_backend"] = "gloo"
    try:
        arguments = stage.config(**options)
    except ValueError as error:  # e.g. bf16 on a device that has none
        raise ConfigError(f"train (stage {recipe.stage}): {error}") from error
    if arguments.deepspeed_plugin is not None:
        # The shipped configurations say 1, which our own trainer needs; TRL's accumulates in DeepSpeed.
        arguments.deepspeed_plugin.deepspeed_config.update(
            train_batch_size=plan.global_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            gradient_clipping=recipe.train.max_grad_norm or 0.0,
        )
    return arguments


def _trainer(
    stage: _Stage,
    recipe: Recipe,
    data: DataBundle,
    model: Model,
    tokenizer: Any,
    arguments: TrainingArguments,
) -> Any:
    """The TRL trainer with our datasets, metrics and progress bar."""
    assert data.train is not None
    trainer: Any = stage.trainer(
        model=model,  # type: ignore[arg-type]
        args=arguments,  # type: ignore[arg-type]
        train_dataset=stage.make_dataset(data.train),
        eval_dataset=stage.make_dataset(data.eval) if data.eval is not None else None,
        processing_class=tokenizer,
    )
    trainer.train_source, trainer.eval_source = data.train, data.eval
    trainer.data_collator = with_rows(trainer.data_collator)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    log = MetricsLog(Path(recipe.run.output_dir) / "metrics.jsonl")
    trainer.add_callback(MetricsCallback(log, overflow_is_normal=recipe.train.precision == "fp16"))
    trainer.add_callback(QuietProgress())
    return trainer


def _train(trainer: Any, recipe: Recipe, resume_from: Path | None) -> None:
    """Runs to the last step, or to an interrupt: then saves, says how to go on and raises."""
    run_dir = Path(recipe.run.output_dir)
    if trainer.is_world_process_zero():
        MetricsLog(run_dir / "metrics.jsonl").rewind(_step(resume_from) if resume_from else -1)
    periodic_eval = recipe.eval.every is not None
    interrupts = Interrupts(trainer.accelerator)
    callback = RunCallback(
        interrupts, evaluate_last=trainer.eval_dataset is not None and not periodic_eval
    )
    trainer.add_callback(callback)
    try:
        with interrupts:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except OSError as error:
        raise TrainingError(
            f"a file could not be written in {run_dir}: {error}; complete checkpoints are intact. Free space "
            "and run the same command to go on from the newest"
        ) from error
    if callback.interrupted:
        if trainer.is_world_process_zero():
            step, total = trainer.state.global_step, trainer.state.max_steps
            logger.warning(
                "interrupted: saved step %d of %d in %s; run the same command to go on",
                step, total, run_dir / "checkpoints",
            )  # fmt: skip
        raise KeyboardInterrupt


def _start_run_dir(
    run_dir: Path, recipe: Recipe, data: DataBundle, plan: BatchPlan, trainer: Any, *, resumed: bool
) -> None:
    """Writes run.json and rejects.jsonl; a resumed run names the settings that changed since."""
    assert data.train is not None
    run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = trainer.accelerator
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "train_rows": len(data.train),
            "eval_rows": len(data.eval) if data.eval is not None else 0,
            "train_hash": data.train.fingerprint,
            "rejects": data.reject_counts,
        },
        "steps": plan.num_steps,
        "batch": {"rows_per_forward": plan.rows_per_forward, "accumulation": plan.accumulation},
        "layout": "padded",
        "processes": accelerator.num_processes,
        "distributed": str(accelerator.distributed_type).rsplit(".", 1)[-1],
        "device": str(accelerator.device),
        "versions": versions(),
        "git": git_commit(),
    }
    path = run_dir / "run.json"
    if resumed and path.is_file():
        warn_about_changes(json.loads(path.read_text(encoding="utf-8")), record)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    data.write_rejects(run_dir / "rejects.jsonl")


def _save_verified(trainer: Any, tokenizer: Any, directory: Path) -> None:
    """Saves adapter or model with its tokenizer, reads it back and compares; every process must call it."""
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    is_peft = isinstance(model, PeftModel)
    names = {name for name, p in model.named_parameters() if p.requires_grad or not is_peft}
    state = gathered_state(accelerator, model, names)
    if accelerator.is_main_process:
        assert state is not None
        save_final(model, tokenizer, directory, state_dict=state)
    accelerator.wait_for_everyone()


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _step(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1
