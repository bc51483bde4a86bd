"""SFT and reward models train what a hand-written torch loop trains, whatever the split and the layout."""

from __future__ import annotations

import json
import os
import shutil
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

from prefopt.commands.export import export_checkpoint
from prefopt.errors import ConfigError, DataError, ModelError, TrainingError
from prefopt.model.reward_model import load_reward_model
from prefopt.recipe.checks import check
from prefopt.recipe.schema import Recipe
from prefopt.signals.reward_model import reward_model as reward_signal
from prefopt.training.metrics import MetricsLog, read_metrics
from prefopt.types import Candidates, Prompt
from prefopt.wiring import train
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
        "better_by": i % 3,
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
    """``make_recipe(stage, name, …, **train)``: one global batch of all rows a step, no clipping."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(
        stage: str,
        name: str = "run",
        peft: dict[str, Any] | None = None,
        columns: dict[str, Any] | None = None,
        layout: str = "auto",
        eval_frac: float = 0.0,
        **train: Any,
    ) -> Recipe:
        sides = {"chosen": "good", "rejected": "bad" if stage == "reward_model" else None}
        source = {"path": str(data), "format": "text", "columns": {**sides, **(columns or {})}}
        settings = {
            "learning_rate": 1e-3,
            "global_batch_size": NUM_ROWS,
            "micro_batch_size": min(10, train.get("global_batch_size", 10)),
            "max_steps": 2,
            "lr_scheduler": "linear",
            "warmup_frac": 0.0,
            "max_grad_norm": None,
        }
        return Recipe.model_validate(
            {
                "stage": stage,
                "model": {"path": str(base), "layout": layout},
                "peft": peft,
                "data": {
                    "train": [source],
                    "eval_frac": eval_frac,
                    "cache_dir": str(tmp_path / "cache"),
                },
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


def rewards(model: nn.Module, side: str) -> torch.Tensor:
    """The model's own score of every row, one row at a time, no padding."""
    rows = [torch.tensor([ids]) for ids, _ in rows_with(side)]
    return torch.stack([model(input_ids=ids).logits[0, 0] for ids in rows])


def reward_loss(model: nn.Module, margin_weight: float = 0.0) -> torch.Tensor:
    """Mean over the pairs of -log σ(reward(chosen) - reward(rejected) - margin)."""
    margins = margin_weight * torch.tensor([row["better_by"] for row in ROWS])
    return -F.logsigmoid(rewards(model, "good") - rewards(model, "bad") - margins).mean()


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


def logged(run_dir: Path, name: str = "loss/total") -> list[float]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


def untrained_reward_model(recipe: Recipe) -> Any:
    pad = make_tokenizer().pad_token_id
    seed = recipe.train.seed
    return load_reward_model(recipe.model, recipe.peft, seed=seed, pad_token_id=pad).model


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    state = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(state)
    for name, parameter in found.named_parameters():
        # AdamW moves a weight by about its learning rate whatever the gradient's size, so where a
        # gradient is all rounding the paths part by a fraction of that; a wrong step is off by 1e-3.
        assert_close(parameter, state[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_sft_equals_a_torch_loop_over_response_tokens(make_recipe: Any, base: Path) -> None:
    run_dir = train(make_recipe("sft"))
    model = AutoModelForCausalLM.from_pretrained(base)
    assert_close(logged(run_dir), two_adamw_steps(model, sft_loss), rtol=1e-5, atol=0)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(run_dir / "final"), model)
    assert json.loads((run_dir / "run.json").read_text())["layout"] == "packed"


def test_reward_model_equals_a_torch_loop_over_pairs(make_recipe: Any) -> None:
    recipe = make_recipe("reward_model")
    model = untrained_reward_model(recipe)
    run_dir = train(recipe)
    assert_close(logged(run_dir), two_adamw_steps(model, reward_loss), rtol=1e-5, atol=0)
    saved = AutoModelForSequenceClassification.from_pretrained(run_dir / "final")
    assert_same_weights(saved, model)


def test_a_margin_column_is_in_the_loss_of_a_reward_model(make_recipe: Any) -> None:
    recipe = make_recipe("reward_model", columns={"margin": "better_by"})
    model = untrained_reward_model(recipe)
    wanted = two_adamw_steps(model, lambda m: reward_loss(m, margin_weight=1.0))
    assert_close(logged(train(recipe)), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_every_split_and_layout_of_a_batch_takes_the_same_steps(
    make_recipe: Any, stage: str
) -> None:
    """22 rows in steps of 8: the last holds 6. Rows differ in length, so a mean of means would differ."""
    settings = {"max_steps": None, "num_epochs": 1, "global_batch_size": 8, "eval_frac": 0.25}
    splits = [{"micro_batch_size": size} for size in (8, 4, 3, 1)]
    splits += [
        {"layout": "padded", "micro_batch_size": 4},
        {"micro_batch_size": None, "micro_batch_tokens": 120},
    ]
    found = []
    for index, split in enumerate(splits):
        run_dir = train(make_recipe(stage, f"run-{index}", **{**settings, **split}))
        names = ("loss/total", "train/grad_norm", "eval/loss/total", "tokens/seen")
        found.append([logged(run_dir, name) for name in names])
    assert len(found[0][0]) == 3
    for other in found[1:]:
        assert_close(other, found[0], rtol=2e-5, atol=0)


def test_the_held_out_loss_is_a_mean_over_response_tokens(
    make_recipe: Any, base: Path, tmp_path: Path
) -> None:
    """Measured before the first step and after the last."""
    recipe = make_recipe("sft", micro_batch_size=4)
    held_out = shutil.copyfile(tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl")
    source = recipe.data.train[0].model_copy(update={"path": str(held_out)})
    data = recipe.data.model_copy(update={"eval": (source,)})
    run_dir = train(recipe.model_copy(update={"data": data}))
    losses = {
        row["step"]: row["eval/loss/total"]
        for row in read_metrics(run_dir / "metrics.jsonl")
        if "eval/loss/total" in row
    }
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (base, run_dir / "final"))
    assert list(losses) == [0, 2]
    assert losses[0] == pytest.approx(sft_loss(before).item(), rel=1e-5)
    assert losses[2] == pytest.approx(sft_loss(after).item(), rel=1e-5)


def scores_of_signal(path: Path, side: str) -> list[float]:
    signal = reward_signal(path=str(path), device="cpu")
    groups = [
        Candidates(Prompt(str(i), (), row["prompt"]), (row[side],), ((),), (False,))
        for i, row in enumerate(ROWS)
    ]
    return [scores[0] for scores in signal.score(groups)]


def test_a_saved_reward_model_is_what_the_signal_scores_with(make_recipe: Any) -> None:
    run_dir = train(make_recipe("reward_model"))
    saved = AutoModelForSequenceClassification.from_pretrained(run_dir / "final").eval()
    with torch.no_grad():
        wanted = rewards(saved, "good").tolist()
    assert scores_of_signal(run_dir / "final", "good") == pytest.approx(wanted, rel=1e-4)


def test_reward_model_under_lora_saves_its_head_and_reads_back(
    make_recipe: Any, base: Path
) -> None:
    recipe = make_recipe(
        "reward_model", peft={"type": "lora", "r": 4}, learning_rate=1e-2, save_every=1
    )
    untrained = untrained_reward_model(recipe)
    run_dir = train(recipe)
    body = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    saved: Any = PeftModel.from_pretrained(body, str(run_dir / "final"))
    head = "base_model.model.score.modules_to_save.default.weight"
    before, after = (dict(m.named_parameters())[head] for m in (untrained, saved))
    assert (before - after).abs().max() > 1e-3
    with torch.no_grad():
        assert reward_loss(saved) < reward_loss(untrained)
        wanted = rewards(saved, "bad").tolist()
    assert scores_of_signal(run_dir / "final", "bad") == pytest.approx(wanted, rel=1e-4)
    export_checkpoint(run_dir, run_dir / "checkpoints" / "step-2", run_dir / "exported")
    files = [run_dir / name / "adapter_model.safetensors" for name in ("exported", "final")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_an_interrupted_run_saves_and_resumes_to_the_same_bits(
    make_recipe: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"global_batch_size": 10, "max_steps": 5, "eval_frac": 0.2}
    straight = train(make_recipe(stage, "straight", **settings))
    append = MetricsLog.append

    def ctrl_c_at_step_2(self: Any, row: Any) -> None:
        append(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "append", ctrl_c_at_step_2)
        train(make_recipe(stage, "killed", **settings))
    resumed = train(make_recipe(stage, "killed", **settings))
    files = [run / "final" / "model.safetensors" for run in (straight, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name in ("loss/total", "train/grad_norm", "tokens/seen", "eval/loss/total"):
        assert logged(resumed, name) == logged(straight, name)


def test_tokens_seen_go_on_where_a_run_is_taken_up_with_other_forwards(make_recipe: Any) -> None:
    settings = {"global_batch_size": 10, "max_steps": 6, "save_every": 2, "keep_checkpoints": 9}
    calm = train(make_recipe("sft", "calm", **settings))
    assert logged(calm, "tokens/seen")[2] == sum(len(ids) for ids, _ in rows_with("good"))
    for name in ("step-4", "step-6"):
        shutil.rmtree(calm / "checkpoints" / name)
    wanted = logged(calm, "tokens/seen")
    train(make_recipe("sft", "calm", **{**settings, "micro_batch_size": 3}))
    assert logged(calm, "tokens/seen") == wanted


def test_an_sft_run_says_what_its_policy_answers(make_recipe: Any) -> None:
    recipe = make_recipe("sft", eval_frac=0.2)
    evaluation = {"generation": {"num_prompts": 2, "max_new_tokens": 4}}
    run_dir = train(
        Recipe.model_validate({**recipe.model_dump(exclude_unset=True), "eval": evaluation})
    )
    assert len(logged(run_dir, "eval/generation/eos_frac")) == 2
    assert (run_dir / "eval" / "generations-2.jsonl").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    make_recipe: Any, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    mark = make_tokenizer().convert_tokens_to_ids("~")
    with torch.no_grad():
        model.get_input_embeddings().weight[mark] = torch.nan  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer(add_bos=True).save_pretrained(tmp_path / "broken")
    recipe = make_recipe("sft", micro_batch_size=1, layout="padded")
    found = recipe.model.model_copy(update={"path": str(tmp_path / "broken")})
    with pytest.raises(
        TrainingError, match=rf"step 1: the loss of 1 .* not finite.*:{MARKED + 1} "
    ):
        train(recipe.model_copy(update={"model": found}))
    assert not (tmp_path / "run" / "final").exists()


def test_the_adapter_of_a_language_model_is_no_reward_model(make_recipe: Any) -> None:
    adapter = train(make_recipe("sft", "adapter", peft={"type": "lora", "r": 2})) / "final"
    recipe = make_recipe("reward_model")
    model = recipe.model.model_copy(update={"path": str(adapter)})
    with pytest.raises(ModelError, match="prefopt merge"):
        train(recipe.model_copy(update={"model": model}))


def test_checkpoints_of_the_trl_stages_are_refused(make_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"an older version.*another run\.output_dir"):
        train(make_recipe("sft"))


def test_a_pair_without_its_margin_is_named(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe("reward_model", columns={"margin": "better_by"})
    rows = [dict(row) for row in ROWS]
    rows[4]["better_by"] = None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:5: column 'better_by' is empty"):
        train(recipe)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"quantization": "4bit"}}, "untrained head"),
        ({"peft": {"type": "lora", "adapter": "somewhere"}}, "no reward head"),
        ({"eval": {"generation": {}}}, "generates nothing"),
        ({"stage": "sft", "columns": {"margin": "better_by"}}, "columns.margin.*would be ignored"),
        ({"columns": {"margin": "m", "score_chosen": "s", "score_rejected": "t"}}, "or the two"),
    ],
)
def test_the_check_refuses_what_would_be_ignored_or_cannot_be(
    make_recipe: Any, changed: dict[str, Any], message: str
) -> None:
    stage, columns = changed.pop("stage", "reward_model"), changed.pop("columns", None)
    raw = make_recipe(stage, columns=columns).model_dump(exclude_unset=True)
    for section, values in changed.items():
        raw[section] = {**(raw.get(section) or {}), **values}
    with pytest.raises(ConfigError, match=message):
        check(Recipe.model_validate(raw))


def test_data_may_be_kept_in_order(make_recipe: Any) -> None:
    recipe = make_recipe("sft", shuffle=False, global_batch_size=1, max_steps=2, log_every=1)
    lengths = [len(ids) for ids, _ in rows_with("good")]
    assert logged(train(recipe), "tokens/seen") == [lengths[0], lengths[0] + lengths[1]]
