"""From a recipe to a run: loads, wires, trains, saves and verifies."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from prefopt.data import DataBundle, PromptSet
from prefopt.data.groups import GroupSource
from prefopt.errors import ConfigError
from prefopt.model.adapters import save_final
from prefopt.model.distributed import (
    check_launch,
    configure_deepspeed,
    gathered_state,
    process_group_options,
)
from prefopt.model.end_tokens import add_end_tokens, end_token_ids
from prefopt.model.extensions import compiling
from prefopt.model.layouts import build_logp_model, build_score_model
from prefopt.model.load import (
    LoadedPolicy,
    check_vocabulary,
    enable_gradient_checkpointing,
    load_policy,
    load_tokenizer,
)
from prefopt.model.logps import LogpModel
from prefopt.model.micro_batches import longest_row_tokens, split_limits
from prefopt.model.precision import keeps_masters, refuse_half, with_precision
from prefopt.model.reward_model import load_reward_model
from prefopt.model.scores import ScoreModel
from prefopt.recipe.checks import check
from prefopt.recipe.load import load_recipe
from prefopt.recipe.registry import BoundObjective, stage_objective
from prefopt.recipe.schema import Recipe
from prefopt.reference.base import Reference
from prefopt.reference.choose import (
    live_reference,
    outside_model,
    stored_outside_reference,
    stored_reference,
)
from prefopt.rollouts.regime import RolloutRegime
from prefopt.rollouts.setup import (
    build_rollouts,
    check_group_tokens,
    load_run_data,
    most_group_tokens,
)
from prefopt.rollouts.statistics import say_time_split
from prefopt.storage.cache import atomic_write
from prefopt.storage.run_files import METRICS_FILE, RUN_FILE, read_run
from prefopt.training.best import Best
from prefopt.training.checkpoint import find_checkpoint, oldest_checkpoint, writing
from prefopt.training.draws import build_draw, check_labels
from prefopt.training.ending import check_ending
from prefopt.training.generation_probe import build_probe
from prefopt.training.optimizer import build_optimizer
from prefopt.training.regimes import OfflineRegime
from prefopt.training.run_record import describe_run, warn_about_changes
from prefopt.training.trainer import PreferenceTrainer, TrainResult

logger = logging.getLogger(__name__)

Module = LogpModel | ScoreModel
"""What is trained, and how it is read."""


def train(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains what the recipe says and returns the run directory.

    Called on every process of a launch; data is tokenised before any process group starts. An interrupted
    run saves, says how to go on, and raises KeyboardInterrupt.

    Raises: ConfigError, DataError, ModelError before training; TrainingError during it.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    check(recipe, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    run_dir = Path(recipe.run.output_dir)
    resume_from = find_checkpoint(run_dir, recipe.train.resume)
    tokenizer = load_tokenizer(recipe.model)
    data, objective = load_run_data(recipe, tokenizer), run_objective(recipe)
    if objective.reads_samples and data.train is not None and not recipe.has_rollouts:
        check_labels(recipe.data, objective, data.train)  # before a model is loaded in vain
    recipe = with_precision(recipe, has_cuda=torch.cuda.is_available())
    accelerator = _accelerator(recipe)
    policy = load_trained(recipe, tokenizer, masters=not keeps_masters(accelerator))
    check_vocabulary(policy.model, tokenizer)
    add_end_tokens(policy.model, end_token_ids(tokenizer, data.end_ids))
    check_ending(recipe, policy, tokenizer, accelerator)
    trainer = build_trainer(
        recipe, data.train, data.eval, policy, accelerator,
        prompts=data.prompts, tokenizer=tokenizer,
    )  # fmt: skip
    try:
        result = _run(recipe, trainer, data, policy, resume_from)
    finally:
        trainer.close()
    if not result.finished:
        _say_how_to_go_on(accelerator, run_dir, result, trainer.regime.num_steps)
    save_verified(trainer.model, policy, tokenizer, run_dir / "final", accelerator)
    accelerator.end_training()
    return run_dir


def run_objective(recipe: Recipe) -> BoundObjective:
    """The recipe's objective, or that of its stage."""
    if recipe.objective is not None:
        return recipe.objective
    margin = {"margin_weight": 1.0} if recipe.data.has_margins else {}
    return stage_objective(recipe.stage, **margin)


def load_trained(recipe: Recipe, tokenizer: Any, *, masters: bool = True) -> LoadedPolicy:
    """What the recipe trains, as it is before the first step: a policy, or a reward model.

    Args:
        masters: hold it in float32 (`prefopt.model.precision`); False where the launch does.
    """
    model, peft, seed = recipe.model, recipe.peft, recipe.train.seed
    if recipe.stage == "reward_model":
        return load_reward_model(
            model, peft, seed=seed, pad_token_id=tokenizer.pad_token_id, masters=masters
        )
    return load_policy(model, peft, seed=seed, masters=masters)


def _run(
    recipe: Recipe,
    trainer: PreferenceTrainer,
    data: DataBundle,
    policy: LoadedPolicy,
    resume_from: Path | None,
) -> TrainResult:
    """Restores, records the run, and trains."""
    run_dir, accelerator = Path(recipe.run.output_dir), trainer.accelerator
    record = describe_run(recipe, data, policy, trainer)
    if resume_from is not None:
        if accelerator.is_main_process and (run_dir / RUN_FILE).is_file():
            warn_about_changes(read_run(run_dir), record)
        step_back = recipe.train.resume == "auto"
        trainer.restore(trainer.checkpoints.intact(resume_from, step_back=step_back))
    # Only now: a start that is refused above leaves the record of the run as it was.
    if accelerator.is_main_process:
        _write_run_files(run_dir, record, data)
    accelerator.wait_for_everyone()
    result = trainer.train()
    if accelerator.is_main_process and recipe.has_rollouts:
        say_time_split(run_dir / METRICS_FILE)
    return result


def build_trainer(
    recipe: Recipe,
    train_source: GroupSource | None,
    eval_source: GroupSource | None,
    policy: LoadedPolicy,
    accelerator: Accelerator,
    *,
    prompts: PromptSet | None = None,
    tokenizer: Any = None,
) -> PreferenceTrainer:
    """The trainer of a recipe, reference log-probs computed or found, engines started, nothing trained yet.

    Sources may be tokenised files (`prefopt.data`) or groups in memory (`windows.GroupList`).

    Args:
        prompts: what rollouts are sampled for.
        tokenizer: what rollouts and the generation probe are decoded with.
    """
    settings, objective = recipe.train, run_objective(recipe)
    build = build_score_model if objective.reads_scores else build_logp_model
    module = build(policy.model, recipe.model.layout)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(policy.model)
    wiring = _Wiring(recipe, objective, policy, accelerator, train_source, eval_source)
    if prompts is None:
        regime, reference, model, optimizer = _wire_offline(wiring, module)
    else:
        assert isinstance(module, LogpModel)  # the check has seen to it
        regime, reference, model, optimizer = _wire_rollouts(wiring, module, prompts, tokenizer)
    # Dropout, where a recipe keeps it, must differ between processes.
    set_seed(settings.seed, device_specific=True)
    return PreferenceTrainer(
        model,
        optimizer,
        objective=objective,
        regime=regime,
        settings=settings,
        accelerator=accelerator,
        run_dir=Path(recipe.run.output_dir),
        limits=regime.limits if isinstance(regime, OfflineRegime) else regime.splits,
        reference=reference,
        eval_source=eval_source,
        importance_cap=None if recipe.rollouts is None else recipe.rollouts.importance_cap,
        eval_every=recipe.eval.every,
        probe=build_probe(recipe, policy, tokenizer, eval_source, accelerator),
        best=None if recipe.eval.best is None else Best(recipe.eval.best, accelerator),
    )


@dataclass(frozen=True)
class _Wiring:
    """What both kinds of regime are wired from."""

    recipe: Recipe
    objective: BoundObjective
    policy: LoadedPolicy
    accelerator: Accelerator
    train_source: GroupSource | None
    eval_source: GroupSource | None


class _Wired(NamedTuple):
    regime: OfflineRegime | RolloutRegime
    reference: Reference | None
    model: Any
    optimizer: Any


def _wire_offline(wiring: _Wiring, module: Module) -> _Wired:
    """A fixed data set: every reference log-prob is known before the first step."""
    recipe, policy, accelerator = wiring.recipe, wiring.policy, wiring.accelerator
    settings, source, held_out = recipe.train, wiring.train_source, wiring.eval_source
    assert source is not None  # the check has seen to it
    longest = longest_row_tokens(source, module.packed)
    limits = split_limits(settings, module, longest, accelerator.device)
    draw = None
    if wiring.objective.reads_samples:
        draw = build_draw(recipe.data.sampling, wiring.objective, source)
    regime = OfflineRegime(
        source,
        global_batch_size=settings.global_batch_size,
        limits=limits,
        seed=settings.seed,
        shuffle=settings.shuffle,
        num_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        draw=draw,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    if draw is not None and accelerator.is_main_process:
        logger.info("%s", draw.summary(regime.num_steps))
    rows = [(source, regime.all_rows())]
    rows += [(held_out, list(range(len(held_out))))] if held_out is not None else []
    reference = None
    if wiring.objective.needs_reference and recipe.reference_name == "model":
        reference = stored_outside_reference(recipe, rows, limits, accelerator)
    model, optimizer = _prepared(wiring, module)
    if wiring.objective.needs_reference and recipe.reference_name == "initial":
        reference = stored_reference(recipe, policy, model, rows, limits, accelerator, initial=True)
    return _Wired(regime, reference, model, optimizer)


def _wire_rollouts(
    wiring: _Wiring, module: LogpModel, prompts: PromptSet, tokenizer: Any
) -> _Wired:
    """Fresh samples: the reference is computed when they arrive, by weights held beside the policy's."""
    recipe, accelerator = wiring.recipe, wiring.accelerator
    assert recipe.rollouts is not None  # prompts are loaded for these alone
    # The sampler's log-probs are at its temperature; what they are compared with must be too.
    module.temperature = recipe.rollouts.temperature
    needed = most_group_tokens(recipe, wiring.objective, prompts, packed=module.packed)
    sources = [s for s in (wiring.train_source, wiring.eval_source) if s is not None]
    longest = max([needed, *(longest_row_tokens(source, module.packed) for source in sources)])
    limits = split_limits(recipe.train, module, longest, accelerator.device)
    check_group_tokens(longest, limits)
    outside = None
    if wiring.objective.needs_reference and recipe.reference_name == "model":
        outside = outside_model(recipe, limits, accelerator)
        outside.temperature = recipe.rollouts.temperature
    model, optimizer = _prepared(wiring, module)
    reference: Reference | None = None
    if wiring.objective.needs_reference:
        reference = live_reference(recipe, model, outside, limits, accelerator)
    root = Path(recipe.run.output_dir) / "checkpoints"
    regime = build_rollouts(
        recipe,
        wiring.objective,
        model=model,
        policy=wiring.policy,
        tokenizer=tokenizer,
        prompts=prompts,
        pairs=wiring.train_source,
        accelerator=accelerator,
        splits=limits,
        on_push=None if reference is None else reference.after_push,
        keep_from=lambda: oldest_checkpoint(root),
    )
    return _Wired(regime, reference, model, optimizer)


def _prepared(wiring: _Wiring, module: Module) -> tuple[Any, Any]:
    """The wrapped model and optimizer."""
    settings = wiring.recipe.train
    refuse_half(module, masters_kept=keeps_masters(wiring.accelerator))
    configure_deepspeed(wiring.accelerator, settings.max_grad_norm)
    optimizer = build_optimizer(module, settings)
    with compiling(wiring.accelerator):
        return wiring.accelerator.prepare(module, optimizer)


def save_verified(
    model: Any, policy: LoadedPolicy, tokenizer: Any, directory: Path, accelerator: Accelerator
) -> None:
    """Saves the final adapter or model with its tokenizer, then reads it back and compares.

    Raises: TrainingError if it cannot be written, or what is on disk is not what was trained.
    """
    module = cast(Module, accelerator.unwrap_model(model))
    prefix = "model."  # it holds the policy under this name
    names = {name for name, p in module.named_parameters() if p.requires_grad or not policy.is_peft}
    state = gathered_state(accelerator, module, names)
    if accelerator.is_main_process:
        assert state is not None
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        save_final(policy.model, tokenizer, directory, state_dict=policy.to_save(state))
        logger.info("saved and verified %s", directory)
    accelerator.wait_for_everyone()


def _longest_wait_s(recipe: Recipe) -> float:
    """How long other processes may wait while the main one starts an engine or samples."""
    if recipe.rollouts is None:
        return 0.0
    engine = recipe.sampled_by
    jobs = 2 * (recipe.rollouts.max_lag + 2)  # a push and a batch each
    return engine.startup_timeout_s + jobs * engine.timeout_s


def _accelerator(recipe: Recipe) -> Accelerator:
    precision = recipe.train.precision
    precision = "no" if precision in ("fp32", "auto") else precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(recipe.run.trackers) or None,
            project_dir=recipe.run.output_dir,
            kwargs_handlers=process_group_options(_longest_wait_s(recipe)),
        )
    except ValueError as error:  # e.g. fp16 on a device that has none
        raise ConfigError(f"train.precision = {recipe.train.precision}: {error}") from error
    check_launch(accelerator)
    if recipe.run.trackers:
        name = recipe.run.name or Path(recipe.run.output_dir).name
        settings = _flat(recipe.model_dump())
        accelerator.init_trackers("prefopt", settings, init_kwargs={"wandb": {"name": name}})
    return accelerator


def _write_run_files(run_dir: Path, record: dict[str, Any], data: DataBundle) -> None:
    """run.json and rejects.jsonl."""
    with writing(run_dir):
        with atomic_write(run_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        data.write_rejects(run_dir / "rejects.jsonl")


def _say_how_to_go_on(
    accelerator: Accelerator, run_dir: Path, result: TrainResult, num_steps: int
) -> None:
    """Ends an interrupted run: every process raises, the main one says what was saved."""
    accelerator.end_training()
    if accelerator.is_main_process:
        logger.warning(
            "interrupted: saved step %d of %d in %s; run the same command to go on",
            result.step,
            num_steps,
            run_dir / "checkpoints",
        )
    raise KeyboardInterrupt


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train.seed": 42, …}``: what trackers take as a configuration."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result |= _flat(value, f"{name}.")
        else:
            result[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return result
