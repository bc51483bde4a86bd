"""From a recipe to a regime of rollouts: prompts, engine, signals, credit, log and probe, wired together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from prefopt.data import DataBundle, PromptSet, Renderer, load_data, load_prompts
from prefopt.data.groups import GroupSource
from prefopt.data.samples import SampleNeeds
from prefopt.engines.base import Engine, SamplingSpec
from prefopt.engines.start import InTraining, Task, start_engine
from prefopt.errors import ConfigError
from prefopt.model.end_tokens import end_token_ids, own_end_ids
from prefopt.model.load import LoadedPolicy
from prefopt.model.micro_batches import SplitLimits
from prefopt.model.sweep import layout_fn
from prefopt.recipe.registry import BoundCredit, BoundObjective, Need
from prefopt.recipe.schema import EngineSection, Recipe, RolloutsSection
from prefopt.rollouts.experience import DIRECTORY as LOG_DIRECTORY
from prefopt.rollouts.experience import ExperienceLog
from prefopt.rollouts.plan import PromptPlan, Schedule
from prefopt.rollouts.probe import Probe
from prefopt.rollouts.publisher import PolicyPublisher
from prefopt.rollouts.regime import RolloutLimits, RolloutRegime
from prefopt.rollouts.sampler import Sampler, Share
from prefopt.signals.combine import build_signals
from prefopt.training.regimes import OfflineRegime
from prefopt.training.run_record import settings_that_count

# Mean |log-prob difference| between trainer and engine, nats a token: rounding gives about 1e-6 in float32
# (1e-4 through another kernel library) and 1e-2 in bfloat16; wrong weights give 0.1 to 10.
_GAP_FP32, _GAP_LOWER = 0.002, 0.1


def _of(recipe: Recipe) -> tuple[RolloutsSection, BoundCredit]:
    """The regime and the credit in force of a recipe with rollouts."""
    assert recipe.rollouts is not None and recipe.credit_in_force is not None
    return recipe.rollouts, recipe.credit_in_force


def load_run_data(recipe: Recipe, tokenizer: Any) -> DataBundle:
    """Pairs or samples, held-out ones and prompts, whichever the recipe trains on."""
    objective, data = recipe.objective, recipe.data
    if objective is None:
        return load_data(data, tokenizer, stage=recipe.stage)
    samples = SampleNeeds.of(objective.needs, data) if objective.reads_samples else None
    if not recipe.has_rollouts:
        return load_data(data, tokenizer, stage=recipe.stage, samples=samples)
    regime, credit = _of(recipe)
    prompts = load_prompts(
        data.prompts or data.train,
        data,
        Renderer(tokenizer),
        max_new_tokens=regime.max_new_tokens,
        signals=recipe.signals,
        needs_offline=credit.spec.needs_offline or regime.reset_frac > 0,
    )
    pairs = data if regime.offline_pairs else data.model_copy(update={"train": ()})
    fixed = load_data(pairs, tokenizer, stage=recipe.stage, samples=samples)
    return replace(fixed, prompts=prompts)


def most_group_tokens(
    recipe: Recipe, objective: BoundObjective, prompts: PromptSet, *, packed: bool
) -> int:
    """Tokens of the largest group that one forward may have to hold: its prompt once, or padded with each.

    Responses that a pair or a baseline ties together stay in one forward; others can be split.
    """
    regime, credit = _of(recipe)
    tied = 1
    if Need.PAIRS in credit.spec.gives:
        tied = regime.samples_per_prompt if credit.name == "all_pairs" else 2
    if Need.GROUPS in objective.needs:
        tied = regime.samples_per_prompt
    offline = max((len(p.offline_ids or ()) for p in prompts.prompts), default=0)
    prompt = max(len(p.ids) for p in prompts.prompts)
    if regime.reset_frac:
        prompt += offline
    response = max(regime.max_new_tokens, offline if credit.spec.needs_offline else 0)
    return prompt + tied * response if packed else tied * (prompt + response)


def build_rollouts(
    recipe: Recipe,
    objective: BoundObjective,
    *,
    model: Any,
    policy: LoadedPolicy,
    tokenizer: Any,
    prompts: PromptSet,
    pairs: GroupSource | None,
    accelerator: Accelerator,
    splits: SplitLimits,
    on_push: Callable[[int], None] | None,
    keep_from: Callable[[], int | None],
) -> RolloutRegime:
    """The regime; engines and signals that this process holds are started. Called on every process.

    Args:
        model: the prepared `LogpModel` of ``policy``, holding its initial weights.
        pairs: the offline pairs of every window, where the recipe mixes them in.
        on_push, keep_from: see `RolloutRegime`.

    Raises: ConfigError, EngineError, SignalError if something does not start or does not fit.
    """
    regime, run_dir = _of(recipe)[0], Path(recipe.run.output_dir)
    section = recipe.sampled_by
    schedule = Schedule(regime.sync_every, regime.max_lag)
    plan = _plan(recipe, prompts)
    num_steps = recipe.train.max_steps or plan.num_steps(recipe.train.num_epochs)
    shares_weights = (
        section.holds_weights and regime.sync_every == 1 and not recipe.engine_has_process
    )
    share = _share(section, accelerator)
    sampler = log = None
    if share is not None:
        engine = _engine(recipe, section, policy, tokenizer, prompts, accelerator, shares_weights)
        sampler = _sampler(recipe, engine, plan, tokenizer, share, own_end_ids(policy.model))
        directory = run_dir / LOG_DIRECTORY / f"rank-{accelerator.process_index:05d}"
        log = ExperienceLog(directory, _lineage(recipe, policy, prompts, accelerator))
    publisher = None
    if not shares_weights:
        publisher = PolicyPublisher(model, policy, tokenizer, accelerator, run_dir)
    layout, limit = layout_fn(packed=splits.packed), _gap_limit(recipe, section, policy)
    return RolloutRegime(
        plan=plan,
        schedule=schedule,
        sampler=sampler,
        log=log,
        publisher=publisher,
        probe=Probe(model, prompts.prompts, accelerator, layout=layout, limit=limit),
        accelerator=accelerator,
        splits=splits,
        limits=_limits(recipe, section, limit),
        num_steps=num_steps,
        whole_groups=Need.GROUPS in objective.needs,
        offline=_offline(recipe, pairs, splits, num_steps, accelerator),
        on_push=on_push,
        keep_from=keep_from,
    )


def _plan(recipe: Recipe, prompts: PromptSet) -> PromptPlan:
    regime, _ = _of(recipe)
    return PromptPlan(
        prompts.prompts,
        seed=recipe.train.seed,
        per_step=regime.prompts_per_step or recipe.train.global_batch_size,
        num_samples=regime.samples_per_prompt,
        reset_frac=regime.reset_frac,
    )


def _share(section: EngineSection, accelerator: Accelerator) -> Share | None:
    """What this process samples: an engine is in every process, or serves the main one."""
    if section.holds_weights:
        return Share(accelerator.process_index, accelerator.num_processes)
    return Share() if accelerator.is_main_process else None


def _engine(
    recipe: Recipe,
    section: EngineSection,
    policy: LoadedPolicy,
    tokenizer: Any,
    prompts: PromptSet,
    accelerator: Accelerator,
    shares_weights: bool,
) -> Engine:
    longest = max(len(p.ids) + len(p.offline_ids or ()) for p in prompts.prompts)
    regime, _ = _of(recipe)
    if not regime.reset_frac:
        longest = max(len(p.ids) for p in prompts.prompts)
    training = InTraining(
        policy,
        recipe.peft,
        recipe.train.seed,
        separate_process=recipe.engine_has_process,
        share_trainable=shares_weights,
    )
    task = Task(
        recipe.model,
        pad_id=tokenizer.pad_token_id or 0,
        max_model_len=longest + regime.max_new_tokens,
        device=str(accelerator.device),
        log_dir=Path(recipe.run.output_dir) / "engine",
        training=training,
    )
    return start_engine(section, task).engine


def _sampler(
    recipe: Recipe,
    engine: Engine,
    plan: PromptPlan,
    tokenizer: Any,
    share: Share,
    own_ends: Sequence[int],
) -> Sampler:
    regime, credit = _of(recipe)

    def decode(sequences: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(ids) for ids in sequences], skip_special_tokens=True)

    return Sampler(
        engine=engine,
        plan=plan,
        spec=SamplingSpec(
            max_new_tokens=regime.max_new_tokens,
            temperature=regime.temperature,
            top_p=regime.top_p,
            top_k=regime.top_k,
            stop_token_ids=end_token_ids(tokenizer, own_ends),
        ),
        decode=decode,
        credit=credit,
        signals=build_signals(recipe.signals) if recipe.signals else None,
        share=share,
        resample_frac=regime.resample_frac,
    )


def _offline(
    recipe: Recipe,
    pairs: GroupSource | None,
    splits: SplitLimits,
    num_steps: int,
    accelerator: Accelerator,
) -> OfflineRegime | None:
    if pairs is None:
        return None
    return OfflineRegime(
        pairs,
        global_batch_size=recipe.train.global_batch_size,
        limits=splits,
        seed=recipe.train.seed,
        max_steps=num_steps,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )


def _gap_limit(recipe: Recipe, section: EngineSection, policy: LoadedPolicy) -> float:
    if section.max_logp_gap is not None:
        return section.max_logp_gap
    own = {p.dtype for p in policy.model.parameters()} | {*policy.half.values()}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in own} | ({section.dtype} - {"auto"})
    exact = dtypes == {"float32"} and recipe.train.precision in ("fp32", "auto")
    return _GAP_FP32 if exact else _GAP_LOWER


def _limits(recipe: Recipe, section: EngineSection, gap: float) -> RolloutLimits:
    regime, _ = _of(recipe)
    # Under dropout, or of a truncated distribution, the sampler's log-probs are not what the trainer computes.
    comparable = regime.top_p == 1 and regime.top_k == 0 and recipe.model.disable_dropout
    return RolloutLimits(
        max_failed_frac=regime.max_failed_frac,
        drop_lag_above=regime.drop_lag_above,
        max_policy_gap=gap if comparable else None,
        timeout_s=section.timeout_s,
        longest_wait_s=recipe.longest_wait_s,
    )


def _lineage(
    recipe: Recipe, policy: LoadedPolicy, prompts: PromptSet, accelerator: Accelerator
) -> str:
    """Hash of whatever decides what the batch of a step is; a batch of another one is not trained on."""
    parts = [
        settings_that_count(recipe),
        policy.weights_hash,
        prompts.fingerprint,
        accelerator.num_processes,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_group_tokens(needed: int, splits: SplitLimits) -> None:
    """Raises ConfigError if a group can be larger than a forward."""
    if needed > splits.max_tokens:
        raise ConfigError(
            f"train.micro_batch_tokens = {splits.max_tokens}: a group of this regime and credit can have "
            f"{needed} tokens, which must fit one forward. Raise it, or lower regime.max_new_tokens or "
            "data.max_prompt_tokens"
        )
