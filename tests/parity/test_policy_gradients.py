"""GRPO, Dr. GRPO and RLOO against TRL's own trainers: they sample, score and train on; we do it after them.

TRL's trainer runs as it is up to its loss: it generates from its policy, calls the reward function, takes
advantages, log-probs of sampler and reference. The policy is then moved, as by an optimizer step, so that
ratios are not 1. From the tokens alone our side makes advantages (credit), log-probs (LogpModel) and loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from prefopt.credit.base import GroupScores
from prefopt.model.collate import make_batch, pack, response_mask
from prefopt.model.logps import LogpModel
from prefopt.recipe.registry import get_credit
from prefopt.types import Group, ObjectiveOutput, Response, ResponseLogps
from tests.parity.recorded_runs import BOS, EOS, SEED, Ids, as_words, word_tokenizer
from tests.unit.memory_trainer import VOCABULARY
from tests.unit.objective_cases import call
from tests.unit.tiny_models import tiny_model

PROMPTS: tuple[Ids, ...] = ((BOS, 5, 9, 12), (BOS, 7), (BOS, 33, 4, 8, 15, 16))
SAMPLES_PER_PROMPT = 4
MAX_TOKENS = 40
"""Long enough for some of a random model's responses to end."""
# fp32: two forwards (packed and padded) and sums over some dozen tokens near 3 nats each.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


class QuietGRPO(GRPOTrainer):
    """TRL's GRPOTrainer, telling nobody."""

    def _send_telemetry(self) -> None: ...


class QuietRLOO(RLOOTrainer):
    """TRL's RLOOTrainer, telling nobody."""

    def _send_telemetry(self) -> None: ...


def reward(prompt: int, ids: Sequence[int]) -> float:
    """Some score of a response to ``PROMPTS[prompt]``; all responses to the last one score the same."""
    if prompt == len(PROMPTS) - 1:
        return 0.1
    return len(set(ids)) / len(ids) + 0.5 * (ids[-1] == EOS) - 0.1 * (ids[0] % 7)


@dataclass
class Sampled:
    """What TRL sampled and computed before its loss, and the policies it did so with."""

    trainer: Any
    inputs: dict[str, Tensor]
    path: Path
    """Directory of the reference, which is where the policy started."""
    sampler: dict[str, Tensor]
    """Weights of the policy when it sampled."""


def sampled(
    trainer_class: Callable[..., Any],
    config_class: Callable[..., Any],
    directory: Path,
    **options: Any,
) -> Sampled:
    """A TRL trainer that has generated once, its policy moved before and after."""
    path = directory / "model"
    model = tiny_model("llama", vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(path)
    config = config_class(
        output_dir=str(directory / "trl"), seed=SEED, num_generations=SAMPLES_PER_PROMPT,
        per_device_train_batch_size=SAMPLES_PER_PROMPT * len(PROMPTS), num_iterations=2,
        max_completion_length=MAX_TOKENS, temperature=1.0, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    rows = [{"prompt": as_words(ids), "row": index} for index, ids in enumerate(PROMPTS)]
    trainer = trainer_class(
        model=str(path), args=config, processing_class=word_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=lambda row, completion_ids, **_: list(map(reward, row, completion_ids)),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # what its training loop sets
    _move(trainer.model, seed=1)  # away from the reference
    sampler = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    torch.manual_seed(SEED)
    repeated = [row for row in rows for _ in range(SAMPLES_PER_PROMPT)]
    inputs = trainer._generate_and_score_completions(repeated)
    _move(trainer.model, seed=2)
    return Sampled(trainer, inputs, path, sampler)


def _move(model: nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def our_model(path: Path, weights: dict[str, Tensor] | None = None) -> LogpModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict(weights)
    return LogpModel(model.eval())


def our_groups(inputs: dict[str, Tensor], credit: str, **values: Any) -> list[Group]:
    """The sampled tokens, one group a prompt, with advantages of our own."""
    ids = [
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    groups = []
    for index, prompt in enumerate(PROMPTS):
        mine = tuple(ids[index * SAMPLES_PER_PROMPT :][:SAMPLES_PER_PROMPT])
        rewards = tuple(reward(index, response) for response in mine)
        scores = GroupScores(rewards, mine, random.Random(0))
        # TRL keeps groups of equal rewards, with advantages of 0.
        advantages = get_credit(credit).fn(scores, keep_degenerate=True, **values).advantages
        responses = tuple(
            Response(response, version=0, advantage=advantage)
            for response, advantage in zip(mine, advantages, strict=True)
        )
        groups.append(Group(str(index), prompt, responses))
    return groups


def our_logps(run: Sampled, groups: list[Group], model: LogpModel) -> ResponseLogps:
    """Everything an objective sees, from tokens and weights."""
    layout, batch = pack(groups), make_batch(groups)
    with torch.no_grad():
        reference = our_model(run.path)(layout)
        behavior = our_model(run.path, run.sampler)(layout)
    return ResponseLogps(
        policy=model(layout),
        mask=response_mask(batch),
        pairs=batch.pairs,
        reference=reference,
        behavior=behavior,
        advantages=batch.advantages,
        samples=batch.samples,
        group=batch.group,
    )


def assert_same_loss_and_gradient(run: Sampled, model: LogpModel, output: ObjectiveOutput) -> None:
    """Ours is the mean over samples, which is how the trainer reduces."""
    assert output.sample_losses is not None
    ours, theirs = (
        output.sample_losses.mean(),
        run.trainer._compute_loss(run.trainer.model, run.inputs),
    )
    assert_close(ours, theirs, **TOLERANCE)
    ours.backward()
    theirs.backward()
    gradients = dict(model.model.named_parameters())
    scale = max(p.grad.abs().max().item() for p in run.trainer.model.parameters())
    assert scale > 1e-3
    for name, parameter in run.trainer.model.named_parameters():
        assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=1e-5 * scale)


def assert_same_before_the_loss(run: Sampled, lp: ResponseLogps) -> None:
    """What TRL took along from sampling; some ratios are clipped, and lengths differ."""
    assert_close(lp.mask, run.inputs["completion_mask"].bool())
    assert len(lp.mask.sum(-1).unique()) > 2
    assert_close(lp.behavior, run.inputs["old_per_token_logps"] * lp.mask, **TOLERANCE)
    assert_close(lp.advantages, run.inputs["advantages"], **TOLERANCE)
    assert ((lp.policy - lp.behavior).detach().exp() - 1).abs().max() > 0.2


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_has_the_loss_and_gradient_of_trl(tmp_path: Path, beta: float) -> None:
    run = sampled(
        QuietGRPO,
        GRPOConfig,
        tmp_path,
        loss_type="grpo",
        beta=beta,
        epsilon=0.1,
        epsilon_high=0.15,
        use_bias_correction_kl=False,
    )
    # TRL adds 1e-4 to the standard deviation.
    groups = our_groups(run.inputs, "group_mean_std", epsilon=1e-4)
    model = our_model(run.path, run.trainer.model.state_dict())
    lp = our_logps(run, groups, model)
    assert_same_before_the_loss(run, lp)
    output = call("grpo", lp, beta=beta, epsilon_low=0.1, epsilon_high=0.15)
    assert output.sample_metrics["ratio/clipped_frac"].any()
    assert_same_loss_and_gradient(run, model, output)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_dr_grpo_has_the_loss_and_gradient_of_trl(tmp_path: Path, beta: float) -> None:
    run = sampled(
        QuietGRPO,
        GRPOConfig,
        tmp_path,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=beta,
        use_bias_correction_kl=False,
    )
    groups = our_groups(run.inputs, "group_mean")
    model = our_model(run.path, run.trainer.model.state_dict())
    lp = our_logps(run, groups, model)
    assert_same_before_the_loss(run, lp)
    output = call("dr_grpo", lp, beta=beta, max_tokens=MAX_TOKENS)
    assert_same_loss_and_gradient(run, model, output)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_has_the_loss_and_gradient_of_trl(tmp_path: Path, beta: float) -> None:
    """TRL takes KL and baseline before its loss, over the rewards; ours adds the KL's in the objective."""
    run = sampled(QuietRLOO, RLOOConfig, tmp_path, beta=beta, epsilon=0.3)
    groups = our_groups(run.inputs, "leave_one_out")
    model = our_model(run.path, run.trainer.model.state_dict())
    lp = our_logps(run, groups, model)
    assert lp.behavior is not None
    assert_close(lp.behavior.sum(-1), run.inputs["old_logps"], **TOLERANCE)
    output = call("rloo", lp, beta=beta, epsilon_low=0.3, epsilon_high=0.3)
    assert output.sample_metrics["ratio/clipped_frac"].any()
    assert not output.sample_metrics["ratio/clipped_frac"].all()
    if beta == 0:
        assert_close(lp.advantages, run.inputs["advantages"], **TOLERANCE)
    assert_same_loss_and_gradient(run, model, output)
