"""Every shipped recipe with rollouts takes two steps: tiny model, local rows, and signals that need no model.

What a preset is about (objective, credit, reference, regime) stays as shipped; only sizes, data, engine and
the reward models, judges and verifiers are replaced. Those have tests of their own in tests/signals.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefopt.errors import SignalError
from prefopt.recipe.load import load_recipe
from prefopt.recipe.registry import get_signal
from prefopt.recipe.schema import Recipe
from prefopt.rollouts.experience import read_log
from prefopt.rollouts.plan import Schedule
from prefopt.training.metrics import read_metrics
from prefopt.types import Candidates, Prompt
from prefopt.wiring import train
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if not {"quickstart", "iterative_dpo", "rest"} & set(path.parts)
    and "name: rollouts" in path.read_text()
)
SHRUNK = {"max_new_tokens", "samples_per_prompt", "prompts_per_step", "max_failed_frac"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, and rows with every column that a preset names."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(chat="chatml")
    torch.manual_seed(0)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    with (directory / "rows.jsonl").open("w") as file:
        for number in range(16):
            request, answer = f"Count to {number}.", f"{number} is where I stop counting"
            asked = {"role": "user", "content": request}
            answered = {"role": "assistant", "content": answer}
            row = {
                "prompt": request, "problem": request, "query": request, "answer": str(number),
                "conversation": [asked, answered], "reference_response": answer,
                "chosen": answer, "rejected": "no",
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return directory


def shrunk(recipe: Recipe, inputs: Path, run_dir: Path) -> list[str]:
    """Overrides that make a preset fit a second of CPU."""
    source = "prompts" if recipe.data.prompts else "train"
    overrides = {
        "model.path": inputs / "model",
        "model.dtype": "float32",
        f"data.{source}.0.path": inputs / "rows.jsonl",
        f"data.{source}.0.split": "null",
        "data.eval": "[]",
        "data.cache_dir": run_dir / "cache",
        "regime.max_new_tokens": 6,
        "regime.samples_per_prompt": 4,
        "engine": "null",
        "train.global_batch_size": 4,
        "train.precision": "fp32",
        "train.warmup_frac": 0,
        "run.output_dir": run_dir / "run",
    }
    if recipe.train.max_steps is None:
        overrides["train.num_epochs"] = 0.5  # of 16 rows, 4 a step
    else:
        overrides["train.max_steps"] = 2
    if recipe.peft is not None:
        overrides["peft"] = "{type: lora, r: 4, lora_alpha: 8}"
    assert recipe.rollouts is not None
    if recipe.rollouts.prompts_per_step is not None:
        overrides["regime.prompts_per_step"] = 4
    if recipe.signals:  # a coin that the last token tosses: about half of the random texts match
        overrides["signals"] = "[{name: regex, pattern: '[a-m0-4 ]$'}]"
    return [f"{key}={value}" for key, value in overrides.items()]


@pytest.mark.parametrize("path", PRESETS, ids=[str(p.relative_to(ROOT)) for p in PRESETS])
def test_every_online_preset_takes_two_steps_as_shipped_but_small(
    path: Path, inputs: Path, tmp_path: Path
) -> None:
    shipped = load_recipe(path)
    overrides = shrunk(shipped, inputs, tmp_path)
    train(path, overrides)
    ran = load_recipe(path, overrides)
    assert (ran.objective, ran.credit) == (shipped.objective, shipped.credit)
    assert ran.reference == shipped.reference
    assert ran.regime.model_dump(exclude=SHRUNK) == shipped.regime.model_dump(exclude=SHRUNK)

    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss/total"]) for row in rows)
    assert sum(row["credit/trained_frac"] for row in rows) > 0
    assert sum(row["train/grad_norm"] for row in rows) > 0
    # Every reference of the presets is the policy itself before the first step.
    assert abs(rows[0].get("kl/reference", 0.0)) < 1e-4

    assert shipped.rollouts is not None
    schedule = Schedule(shipped.rollouts.sync_every, shipped.rollouts.max_lag)
    versions = {commit["commit"]: commit["version"] for commit, _ in read_log(tmp_path / "run")}
    assert versions == {step: schedule.version_of(step) for step in (0, 1)}


def test_athene_is_its_scalar_head_at_the_cls_token(inputs: Path, tmp_path: Path) -> None:
    """Against the forward of its authors' class, written out: backbone, ``v_head``, last CLS position."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(chat="chatml")
    tokenizer.add_special_tokens({"cls_token": "<unk>"})
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    model.config.save_pretrained(tmp_path)
    backbone = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    save_file({**backbone, "v_head.weight": head.weight.detach()}, tmp_path / "model.safetensors")

    load_recipe(ROOT / "recipes" / "online_dpo" / "bridging-chat.yaml")  # imports the plugin
    athene = get_signal("athene").fn(path=str(tmp_path), dtype="float32", device="cpu")
    texts = ("yes", "a longer answer, so that one of the two is padded")
    prompt = Prompt("p", (), ({"role": "user", "content": "Is it?"},))
    (scores,) = athene.score([Candidates(prompt, texts, ((1,), (1,)), (False, False))])
    for text, score in zip(texts, scores, strict=True):
        turns = [*prompt.content, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False) + "<unk>")["input_ids"]
        with torch.no_grad():
            hidden = model.eval().model(torch.tensor([ids])).last_hidden_state[0]
        assert ids.count(tokenizer.cls_token_id) == 1
        expected = head(hidden)[ids.index(tokenizer.cls_token_id)].item()
        assert score == pytest.approx(expected, abs=1e-5)
    (inputs / "other").mkdir()
    model.save_pretrained(inputs / "other")  # no v_head: its score would be random
    tokenizer.save_pretrained(inputs / "other")
    with pytest.raises(SignalError, match="no Athene checkpoint"):
        get_signal("athene").fn(path=str(inputs / "other"), device="cpu")


def test_drpo_rolls_in_a_prefix_of_every_response(inputs: Path, tmp_path: Path) -> None:
    path = ROOT / "recipes" / "rloo" / "drpo-tldr.yaml"
    train(path, [*shrunk(load_recipe(path), inputs, tmp_path), "train.max_steps=1"])
    ((_, groups),) = read_log(tmp_path / "run")
    assert len(groups) == 4
    assert all(group["prefix_tokens"] > 0 for group in groups)


@pytest.mark.parametrize(
    "name", ["grpo/bridging-math", "rloo/drpo-tldr", "online_dpo/bridging-math"]
)
def test_a_step_that_teaches_nothing_moves_nothing_and_stops_nothing(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    """All scores equal in both steps: no group has a label, and the run goes through all the same."""
    path = ROOT / "recipes" / f"{name}.yaml"
    never = "signals=[{name: regex, pattern: 'no such text'}]"
    train(path, [*shrunk(load_recipe(path), inputs, tmp_path), never])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["credit/trained_frac"] for row in rows] == [0, 0]
    assert [row["train/grad_norm"] for row in rows] == [0, 0]
