"""From a recipe to a run: loads, wires, trains, saves and verifies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from prefopt.data import DataBundle, PromptSet
from prefopt.data.groups import GroupSource
from prefopt.model.adapters import save_final
from prefopt.model.distributed import (
    configure_deepspeed,
    gathered_state,
    together,
)
from prefopt.model.end_tokens import add_end_tokens, end_token_ids
from prefopt.model.extensions import compiling
from prefopt.model.fit import check_positions
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
from prefopt.process.ended import begins, ended
from prefopt.process.launch import check_launched
from prefopt.process.progress import progress
from prefopt.process.ranks import joined
from prefopt.process.stopping import Stopped
from prefopt.recipe.checks import check
from prefopt.recipe.load import load_recipe
from prefopt.recipe.registry import BoundObjective, stage_objective
from prefopt.recipe.run_directory import FINAL
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
from prefopt.storage.holder import refuse_if_held
from prefopt.storage.run_files import METRICS_FILE
from prefopt.training.best import Best
from prefopt.training.checkpoint import oldest_checkpoint, writing
from prefopt.training.draws import build_draw, check_labels
from prefopt.training.ending import check_ending
from prefopt.training.generation_probe import build_probe
from prefopt.training.optimizer import build_optimizer, say_if_nothing_moves
from prefopt.training.regimes import OfflineRegime
from prefopt.training.run_record import (
    describe_run,
    start_trackers,
    with_history,
    write_record,
)
from prefopt.training.start import (
    IN_USE_ADVICE,
    Start,
    check_length,
    check_weights,
    find_start,
    open_accelerator,
    run_held,
)
from prefopt.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

Module = LogpModel | ScoreModel
"""What is trained, and how it is read."""


def train(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains what the recipe says and returns the run directory.

    Called on every process of a launch; data is tokenised before any process group starts. An interrupted
    run saves and raises `Stopped`, a KeyboardInterrupt; `progress.stands` says how to go on.

    Raises: ConfigError, DataError, ModelError before training; TrainingError during it.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    with joined():
        return _train(recipe)


def _train(recipe: Recipe) -> Path:
    progress.enter("looking at the recipe")
    progress.stands = "nothing was trained, and there is nothing to save"
    check(recipe, num_processes=check_launched().world_size)
    run_dir = Path(recipe.run.output_dir)
    progress.enter("reading the data")
    refuse_if_held(run_dir, work="run", advice=IN_USE_ADVICE)
    tokenizer = load_tokenizer(recipe.model)
    data, objective = load_run_data(recipe, tokenizer), run_objective(recipe)
    if objective.reads_samples and data.train is not None and not recipe.has_rollouts:
        check_labels(recipe.data, objective, data.train)  # before a model is loaded in vain
    recipe = with_precision(recipe, has_cuda=torch.cuda.is_available())
    progress.enter("meeting the other processes")
    accelerator = open_accelerator(recipe)
    with run_held(accelerator, run_dir):
        start = find_start(accelerator, recipe, data)
        if start.is_finished:
            logger.info("%s: the run of these settings is finished; nothing to train", run_dir)
        else:
            with ended(run_dir):
                _train_from(start, recipe, data, tokenizer, accelerator)
    accelerator.end_training()
    return run_dir


def _train_from(
    start: Start, recipe: Recipe, data: DataBundle, tokenizer: Any, accelerator: Accelerator
) -> None:
    """Trains to the end and saves the result; an interrupt saves, says how to go on, and goes up."""
    run_dir = Path(recipe.run.output_dir)
    if start.resume_from is not None:
        progress.stands = f"{start.resume_from} stands; run the same command to go on"
    progress.enter("loading the model")
    start_trackers(accelerator, recipe)
    policy = load_trained(recipe, tokenizer, masters=not keeps_masters(accelerator))
    check_vocabulary(policy.model, tokenizer)
    check_positions(policy.model, [data.train, data.eval])
    add_end_tokens(policy.model, end_token_ids(tokenizer, data.end_ids))
    check_ending(recipe, policy, tokenizer, accelerator)
    check_weights(recipe, start, policy)
    progress.stuck_after_s = recipe.run.stuck_after_s
    progress.enter("preparing to train", at_most_s=recipe.longest_wait_s)
    trainer = build_trainer(
        recipe, data.train, data.eval, policy, accelerator,
        prompts=data.prompts, tokenizer=tokenizer,
    )  # fmt: skip
    record = describe_run(recipe, data, policy, trainer)
    try:
        record = _begin(recipe, trainer, data, record, start)
        result = trainer.train()
    finally:
        trainer.close()
    if accelerator.is_main_process and recipe.has_rollouts:
        say_time_split(run_dir / METRICS_FILE)
    if result.signal is not None:
        accelerator.end_training()
        progress.enter("training")
        raise Stopped(result.signal)
    progress.stands = "all steps are done and saved; the same command makes final/"
    progress.enter("saving what was trained", at_most_s=3600.0)
    save_verified(trainer.model, policy, tokenizer, run_dir / FINAL, accelerator)
    if accelerator.is_main_process:
        write_record(run_dir, {**record, "finished": {"step": result.step}})
    progress.stands = f"finished, in {run_dir / FINAL}"


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


def _begin(
    recipe: Recipe,
    trainer: PreferenceTrainer,
    data: DataBundle,
    record: dict[str, Any],
    start: Start,
) -> dict[str, Any]:
    """Restores, and records the run; returns the record."""
    run_dir, accelerator = Path(recipe.run.output_dir), trainer.accelerator
    if start.resume_from is not None:
        step_back = recipe.train.resume == "auto"
        trainer.restore(trainer.checkpoints.intact(start.resume_from, step_back=step_back))
        check_length(recipe, trainer.regime.step, trainer.regime.num_steps)
    record = with_history(record, start, trainer.regime.step)
    # Only now: a start that is refused above leaves the record of the run as it was.
    if accelerator.is_main_process:
        begins(run_dir)
        write_record(run_dir, record)
        with writing(run_dir):
            data.write_rejects(run_dir / "rejects.jsonl")
    accelerator.wait_for_everyone()
    return record


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
    module = build(policy.model, recipe.model.layout, recipe.model.router_aux_loss_coef)
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
    say_if_nothing_moves(settings, regime.num_steps)
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
    say_if_nothing_moves(recipe.train, regime.num_steps)
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
    with together(accelerator, f"saving {directory}"):
        if accelerator.is_main_process:
            assert state is not None
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            save_final(policy.model, tokenizer, directory, state_dict=policy.to_save(state))
            logger.info("saved and verified %s", directory)
