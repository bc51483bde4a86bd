"""The TRL stages train what a hand-written torch loop trains, on our tokens, and ignore no setting."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from prefopt.errors import ConfigError, ModelError, TrainingError
from prefopt.recipe.checks import check
from prefopt.recipe.schema import Recipe, TrainSection
from prefopt.stages import run_stage
from prefopt.stages.arguments import plan_batches, training_arguments
from prefopt.stages.callbacks import MetricsCallback, project_names
from prefopt.stages.reward_model import load_reward_model
from prefopt.stages.run import find_stage_checkpoint
from prefopt.stages.trainers import StageRewardTrainer, StageSFTTrainer
from prefopt.training.metrics import read_metrics
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

NUM_ROWS = 30
MARKED = 17
"""The one row with a ``~`` in it."""
ROWS = [
    {
        "prompt": f"{'very ' * (i % 4)}short question {i}{'~' * (i == MARKED)}:\n",
        "good": f"answer {i * 7}",
        "bad": "no" * (1 + i % 5),
    }
    for i in range(NUM_ROWS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved as a user would have it."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(add_bos=True)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def make_recipe(base: Path, tmp_path: Path) -> Any:
    """``make_recipe(stage, name, peft=…, **train)``: one global batch of all rows a step, no clipping."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(
        stage: str, name: str = "run", peft: dict[str, Any] | None = None, **train: Any
    ) -> Recipe:
        columns = {"chosen": "good", "rejected": "bad" if stage == "reward_model" else None}
        source = {"path": str(data), "format": "text", "columns": columns}
        settings = {
            "learning_rate": 1e-3,
            "global_batch_size": NUM_ROWS,
            "micro_batch_size": 10,
            "max_steps": 2,
            "lr_scheduler": "linear",
            "warmup_frac": 0.0,
            "max_grad_norm": None,
        }
        return Recipe.model_validate(
            {
                "stage": stage,
                "model": {"path": str(base)},
                "peft": peft,
                "data": {"train": [source], "cache_dir": str(tmp_path / "cache")},
                "train": settings | train,
                "run": {"output_dir": str(tmp_path / name)},
            }
        )

    return make


def token_ids(text: str) -> list[int]:
    """``<s>`` + text, by the tokenizer itself and not by our renderer."""
    return make_tokenizer(add_bos=True)(text)["input_ids"]


def rows_with(side: str) -> list[tuple[list[int], int]]:
    """Per row: ids of prompt + response + EOS, and how many of them are the prompt's."""
    eos = make_tokenizer(add_bos=True).eos_token_id
    return [
        ([*token_ids(row["prompt"] + row[side]), eos], len(token_ids(row["prompt"])))
        for row in ROWS
    ]


def sft_loss(model: nn.Module) -> torch.Tensor:
    """Σ -log p over the response tokens of all rows / their number; one row at a time, no padding."""
    total, count = torch.zeros(()), 0
    for ids, num_prompt in rows_with("good"):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        total = total + F.cross_entropy(
            logits[num_prompt - 1 : -1], torch.tensor(ids[num_prompt:]), reduction="sum"
        )
        count += len(ids) - num_prompt
    return total / count


def reward_loss(model: nn.Module) -> torch.Tensor:
    """Mean over the pairs of -log σ(reward(chosen) - reward(rejected)); one row at a time, no padding."""

    def rewards(side: str) -> torch.Tensor:
        rows = [torch.tensor([ids]) for ids, _ in rows_with(side)]
        return torch.stack([model(input_ids=ids).logits[0, 0] for ids in rows])

    return -F.logsigmoid(rewards("good") - rewards("bad")).mean()


def two_adamw_steps(model: nn.Module, loss_of: Any) -> list[float]:
    """Losses of two steps of AdamW at 1e-3 and then, half-way down the linear schedule, 5e-4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for rate in (1e-3, 5e-4):
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logged_losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [row["loss/total"] for row in rows if "loss/total" in row]


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    state = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(state)
    for name, parameter in found.named_parameters():
        # AdamW moves a weight by about its learning rate whatever the gradient's size, so where a
        # gradient is all rounding the paths part by a fraction of that; a wrong step is off by 1e-3.
        assert_close(parameter, state[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_sft_equals_a_torch_loop_over_response_tokens(make_recipe: Any, base: Path) -> None:
    run_dir = run_stage(make_recipe("sft"))
    model = AutoModelForCausalLM.from_pretrained(base)
    assert_close(logged_losses(run_dir), two_adamw_steps(model, sft_loss), rtol=1e-5, atol=0)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(run_dir / "final"), model)


def test_sft_loss_does_not_depend_on_how_the_batch_is_split(make_recipe: Any) -> None:
    """Rows differ in length: a mean of micro-batch means, the usual mistake, would differ."""
    split = run_stage(make_recipe("sft", "split", micro_batch_size=3))
    whole = run_stage(make_recipe("sft", "whole", micro_batch_size=NUM_ROWS))
    assert_close(logged_losses(split), logged_losses(whole), rtol=1e-5, atol=0)


def test_reward_model_equals_a_torch_loop_over_pairs(make_recipe: Any) -> None:
    recipe = make_recipe("reward_model")
    pad = make_tokenizer().pad_token_id
    model = load_reward_model(recipe.model, None, seed=recipe.train.seed, pad_token_id=pad)
    run_dir = run_stage(recipe)
    assert_close(logged_losses(run_dir), two_adamw_steps(model, reward_loss), rtol=1e-5, atol=0)
    saved = AutoModelForSequenceClassification.from_pretrained(run_dir / "final")
    assert_same_weights(saved, model)


def test_reward_model_under_lora_saves_its_head_and_reads_back(
    make_recipe: Any, base: Path
) -> None:
    recipe = make_recipe("reward_model", peft={"type": "lora", "r": 4}, learning_rate=1e-2)
    pad = make_tokenizer().pad_token_id
    untrained: Any = load_reward_model(recipe.model, recipe.peft, seed=42, pad_token_id=pad)
    run_dir = run_stage(recipe)
    body = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    saved: Any = PeftModel.from_pretrained(body, str(run_dir / "final"))
    head = "base_model.model.score.modules_to_save.default.weight"
    before, after = (dict(m.named_parameters())[head] for m in (untrained, saved))
    assert (before - after).abs().max() > 1e-3
    with torch.no_grad():
        assert reward_loss(saved) < reward_loss(untrained)


def test_an_interrupted_run_saves_and_resumes_to_the_same_bits(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"global_batch_size": 10, "max_steps": 5}
    straight = run_stage(make_recipe("sft", "straight", **settings))
    log = MetricsCallback.on_log

    def ctrl_c_at_step_2(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsCallback, "on_log", ctrl_c_at_step_2)
        run_stage(make_recipe("sft", "killed", **settings))
    resumed = run_stage(make_recipe("sft", "killed", **settings))
    files = [run / "final" / "model.safetensors" for run in (straight, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert logged_losses(resumed) == logged_losses(straight)


def test_a_run_evaluates_before_its_first_and_after_its_last_step(make_recipe: Any) -> None:
    recipe = make_recipe("sft", max_steps=3)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval_frac": 0.2})})
    rows = read_metrics(run_stage(recipe) / "metrics.jsonl")
    evaluated = {row["step"]: row["eval/loss/total"] for row in rows if "eval/loss/total" in row}
    assert list(evaluated) == [0, 3]
    assert evaluated[3] < evaluated[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    make_recipe: Any, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    mark = make_tokenizer().convert_tokens_to_ids("~")
    with torch.no_grad():
        model.get_input_embeddings().weight[mark] = torch.nan  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer(add_bos=True).save_pretrained(tmp_path / "broken")
    recipe = make_recipe("sft", micro_batch_size=1)
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "broken")})}
    )
    with pytest.raises(
        TrainingError, match=rf"step 1: the loss is nan\. Rows of this forward: \S+:{MARKED + 1}\."
    ):
        run_stage(recipe)
    assert not (tmp_path / "run" / "final").exists()


def test_the_adapter_of_a_language_model_is_no_reward_model(make_recipe: Any) -> None:
    adapter = run_stage(make_recipe("sft", "adapter", peft={"type": "lora", "r": 2})) / "final"
    recipe = make_recipe("reward_model")
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(adapter)})}
    )
    with pytest.raises(ModelError, match="prefopt merge"):
        run_stage(recipe)


CHANGED: dict[str, Any] = {
    "learning_rate": 2e-3,
    "global_batch_size": 15,
    "micro_batch_size": 5,
    "micro_batch_tokens": 100,
    "num_epochs": 3.0,
    "max_steps": 7,
    "lr_scheduler": "constant",
    "warmup_frac": 0.5,
    "optimizer": "rmsprop",
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "seed": 7,
    "save_every": 3,
    "keep_checkpoints": 5,
    "log_every": 6,
}


@pytest.mark.parametrize("key", sorted(set(TrainSection.model_fields) - {"resume", "shuffle"}))
def test_every_train_setting_reaches_trl(make_recipe: Any, key: str) -> None:
    """A key added to the schema and not here fails; `resume` has tests of its own, `shuffle` is refused here."""

    def arguments(**changed: Any) -> dict[str, Any]:
        recipe = make_recipe("sft", **{"max_steps": None, "micro_batch_size": None, **changed})
        plan = plan_batches(recipe.train, [20] * NUM_ROWS, num_processes=1)
        return training_arguments(recipe, plan, has_eval=True)

    assert arguments(**{key: CHANGED[key]}) != arguments()


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("model", {"layout": "packed"}, "TRL's trainer, which pads"),
        ("model", {"quantization": "4bit"}, "untrained head"),
        ("run", {"trackers": ("aim",)}, "logs to clearml"),
        ("peft", {"type": "lora", "adapter": "somewhere"}, "no reward head"),
    ],
)
def test_the_check_refuses_what_trl_cannot_honour(
    make_recipe: Any, section: str, changed: dict[str, Any], message: str
) -> None:
    raw = make_recipe("reward_model").model_dump(exclude_unset=True)
    raw[section] = {**(raw.get(section) or {}), **changed}
    with pytest.raises(ConfigError, match=message):
        check(Recipe.model_validate(raw))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"global_batch_size": 24}, (24, 1)),
        ({"global_batch_size": 24, "micro_batch_size": 7}, (6, 4)),  # the largest divisor <= 7
        (
            {"global_batch_size": 24, "micro_batch_tokens": 100},
            (4, 6),
        ),  # 5 rows of 20 fit, 4 divide
    ],
)
def test_a_batch_is_split_into_the_largest_forwards_that_fit(
    train: dict[str, Any], expected: tuple[int, int]
) -> None:
    plan = plan_batches(TrainSection(learning_rate=1e-3, **train), [20] * 48, num_processes=1)
    assert (plan.rows_per_forward, plan.accumulation) == expected
    assert plan.num_steps == 2


@pytest.mark.parametrize(
    ("train", "processes", "message"),
    [
        ({"global_batch_size": 10}, 4, "does not divide over 4 processes; use 8 or 12"),
        ({"global_batch_size": 2}, 4, "some would have nothing to do"),
        ({"global_batch_size": 4, "micro_batch_tokens": 19}, 1, "the longest row takes 20 tokens"),
    ],
)
def test_a_batch_that_cannot_be_split_says_what_would(
    train: dict[str, Any], processes: int, message: str
) -> None:
    settings = TrainSection(learning_rate=1e-3, **train)
    with pytest.raises(ConfigError, match=message):
        plan_batches(settings, [20] * 48, num_processes=processes)


def test_resume_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        directory = tmp_path / "checkpoints" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        # 11 was being written when the process died
        (directory / "trainer_state.json").write_text("{}" if step < 11 else '{"global_st')
    assert find_stage_checkpoint(tmp_path, "auto") == tmp_path / "checkpoints" / "checkpoint-10"
    with pytest.raises(ConfigError, match="up to checkpoint-10"):
        find_stage_checkpoint(tmp_path, "never")
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        find_stage_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "checkpoint-11"))
    assert find_stage_checkpoint(tmp_path / "new", "auto") is None


def test_metrics_of_trl_get_the_names_of_this_project() -> None:
    row = project_names({"eval_loss": 1.0, "eval_margin": 2.0, "eval_runtime": 3.0, "epoch": 1.0})
    assert row == {
        "eval/loss/total": 1.0,
        "eval/rewards/margin": 2.0,
        "time/eval_s": 3.0,
        "train/epoch": 1.0,
    }
    assert project_names({"surprise": 1.0}) == {"trl/surprise": 1.0}  # renamed, never dropped
    assert project_names({"train_runtime": 9.0, "train_loss": 0.1}) == {}


def test_a_stage_sends_no_telemetry() -> None:
    """TRL 1.16 reports every trainer it constructs; if it renames the hook, this fails."""
    for ours, theirs in ((StageSFTTrainer, SFTTrainer), (StageRewardTrainer, RewardTrainer)):
        assert callable(theirs._send_telemetry)
        assert ours._send_telemetry is not theirs._send_telemetry
