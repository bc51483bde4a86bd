"""What trains is kept in float32, whatever the dtype of the files: updates are never rounded away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from prefopt.errors import ConfigError
from prefopt.model.load import load_policy
from prefopt.model.precision import loaded_dtype, with_precision
from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import ModelSection, PeftSection
from prefopt.reference.live import LiveReference
from prefopt.training.metrics import read_metrics
from prefopt.wiring import train
from tests.distributed.launch import write_pairs, write_recipe
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

RATE = 5e-7
STEPS = 12
PLUGIN = """
from prefopt.recipe.registry import signal
from prefopt.signals.base import per_response

@signal("vowels", source="tests")
def vowels():
    return per_response(lambda prompt, text: sum(c in "aeiou" for c in text) / (1 + len(text)))
"""


def write_model(
    directory: Path, dtype: torch.dtype = torch.bfloat16, *, kind: str = "llama"
) -> Path:
    tokenizer = make_tokenizer()
    tiny_model(kind, vocab_size=len(tokenizer)).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps one precision a process; a run of another is a process of its own elsewhere."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A base saved in bfloat16, and pairs."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 16)
    return tmp_path


def recipe(inputs: Path, name: str, **sections: Any) -> Path:
    """A few steps of DPO with full fine-tuning in ``inputs / name``; ``sections`` add to it."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(inputs / "model")},
        "data": {
            "train": [{"path": str(inputs / "pairs.jsonl")}],
            "cache_dir": str(inputs / "cache"),
        },
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {
            "learning_rate": RATE, "global_batch_size": 4, "max_steps": STEPS,
            "warmup_frac": 0.0, "lr_scheduler": "constant",
        },
        "run": {"output_dir": str(inputs / name)},
    }  # fmt: skip
    if sections.get("stage") == "reward_model":
        del settings["objective"]
    for key, section in sections.items():
        settings[key] = (
            {**settings.get(key, {}), **section} if isinstance(section, dict) else section
        )
    path = inputs / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def trained(run: Path) -> dict[str, torch.Tensor]:
    """What is in training at the end, from the last checkpoint."""
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    state = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def distance(found: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(found[name].double() - start[name].double()).flatten() for name in found])


def test_bfloat16_weights_take_every_update_and_are_saved_as_they_came(inputs: Path) -> None:
    """Against the same run in fp32 throughout; bfloat16 weights alone move 1 % of what they should."""
    run = train(recipe(inputs, "auto"))
    AcceleratorState._reset_state()
    truth = train(recipe(inputs, "truth", model={"dtype": "float32"}, train={"precision": "fp32"}))
    start = load_file(inputs / "model" / "model.safetensors")
    moved, wanted = distance(trained(run), start), distance(trained(truth), start)
    assert {t.dtype for t in trained(run).values()} == {torch.float32}
    used = wanted.abs() > RATE  # embeddings of tokens that no row has stay where they are
    assert used.double().mean() > 0.5
    assert (moved[used] != 0).double().mean() > 0.999
    # bf16 compute decides the sign of gradients near 0; what moves, moves as far.
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    assert moved.norm() / wanted.norm() == pytest.approx(1, abs=0.05)
    saved = load_file(run / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[n], t.bfloat16()) for n, t in trained(run).items() if n in saved)
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    reloaded = AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto")
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["train"]["precision"] == "bf16"
    assert "trained in float32 and saved in bfloat16" in record["weights"]["description"]


def test_a_resumed_bfloat16_run_ends_bit_for_bit_where_the_whole_one_does(inputs: Path) -> None:
    whole = train(recipe(inputs, "whole", train={"max_steps": 4}))
    half = recipe(inputs, "half", train={"max_steps": 4, "save_every": 2, "keep_checkpoints": 9})
    run = train(half)
    for name in ("checkpoints/step-4", "final"):
        (run / name).rename(run / f"{Path(name).name}-gone")
    train(half)
    for name, tensor in trained_in(whole, 4).items():
        assert torch.equal(trained_in(run, 4)[name], tensor)
    for each in (whole, run):
        assert read_metrics(each / "metrics.jsonl")[-1]["step"] == 4


def trained_in(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "lora", "r": 4},
        {"type": "lora", "r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
        {"type": "lora", "r": 4, "bias": "all"},
        {"type": "lora", "r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"type": "lora", "r": 4, "use_dora": True},
        {"type": "ln_tuning"},
    ],
    ids=["lora", "saved modules", "bias", "embeddings", "dora", "norms"],
)
def test_every_part_that_an_adapter_trains_takes_every_update(
    inputs: Path, peft: dict[str, Any]
) -> None:
    """Some of what peft trains it leaves in the base's dtype: saved modules, biases, copies of norms."""
    if "bias" in peft:  # of which the plain Llama has none
        write_model(inputs / "model", kind="llama_tied")
    run = train(recipe(inputs, "run", peft=peft, train={"max_steps": 3}))
    found = trained(run)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    loaded = load_policy(ModelSection(path=str(inputs / "model")), PeftSection(**peft), seed=42)
    start = {n: p for n, p in loaded.model.named_parameters() if n in found}
    still = [
        name
        for name, tensor in found.items()
        if "lora_A" not in name and "embedding_B" not in name  # no gradient before B has moved
        and (tensor != start[name]).double().mean() < (0.03 if "embed" in name else 0.8)
    ]  # fmt: skip
    assert not still
    again = load_policy(ModelSection(path=str(run / "final")), None, seed=0, trainable=False)
    assert isinstance(again.model, PeftModel)


def test_a_reward_models_head_takes_every_update(inputs: Path) -> None:
    for name, peft in (("full", {}), ("lora", {"peft": {"type": "lora", "r": 4}})):
        run = train(recipe(inputs, name, stage="reward_model", **peft))
        found = trained(run)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        (head,) = [tensor for key, tensor in found.items() if "score" in key]
        # As loaded it was bfloat16: what a few steps of 5e-7 have done to it is far below that.
        assert (head != head.bfloat16()).double().mean() > 0.95
        (file,) = (run / "final").glob("*.safetensors")
        assert [t.dtype for key, t in load_file(file).items() if "score" in key] == [torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "cuda", "decided"),
    [
        (torch.float32, False, ("auto", "fp32")),
        (torch.bfloat16, False, ("auto", "bf16")),
        (torch.float16, True, ("auto", "fp16")),
        (torch.float16, False, ("float32", "fp32")),  # no loss scaler without CUDA
    ],
)
def test_precision_is_that_of_the_weights(
    tmp_path: Path, dtype: torch.dtype, cuda: bool, decided: tuple[str, str]
) -> None:
    path = write_model(tmp_path / "model", dtype)
    file = write_recipe(tmp_path / "recipe.yaml", path, write_pairs(tmp_path / "p.jsonl", 2))
    found = with_precision(load_recipe(file), has_cuda=cuda)
    assert (found.model.dtype, found.train.precision) == decided
    named = with_precision(load_recipe(file, ["model.dtype=float32"]), has_cuda=cuda)
    assert (named.model.dtype, named.train.precision) == ("float32", "fp32")
    config = json.loads((path / "config.json").read_text())  # an older file, which does not say
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    assert loaded_dtype(ModelSection(path=str(path))) == dtype


def test_a_precision_of_another_range_than_the_frozen_weights_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    file = write_recipe(tmp_path / "recipe.yaml", path, write_pairs(tmp_path / "p.jsonl", 2))
    asked = load_recipe(file, ["train.precision=fp16"])
    with pytest.raises(ConfigError, match=r"does not go with model\.dtype = 'bfloat16'"):
        with_precision(asked, has_cuda=True)


def test_bfloat16_asked_for_by_name_is_refused_before_anything_loads(inputs: Path) -> None:
    file = recipe(inputs, "named", model={"dtype": "bfloat16"})
    with pytest.raises(
        ConfigError, match=r"Leave model\.dtype out: the weights then train in float32"
    ):
        train(file)
    assert not (inputs / "named").exists()


def test_a_moving_reference_of_bfloat16_weights_goes_all_the_way(tmp_path: Path) -> None:
    """DeepSpeed's weights are bfloat16 beside its masters; an average in bfloat16 went an eighth of the way.

    100 steps at 0.01 towards a constant: 1 - 0.99^100 of the distance, to the bit again from a checkpoint.
    """
    model = nn.Linear(32, 32, dtype=torch.bfloat16)
    start = [p.detach().double() for p in model.parameters()]
    build: Any = partial(
        LiveReference, model, kind="ema", layout=None, device=torch.device("cpu"), ema_rate=0.01
    )
    reference = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    for step in range(100):
        if step == 50:
            state = {name: tensor.clone() for name, tensor in reference.state().items()}
        reference.after_step()
    for held, first, now in zip(reference._held[0], start, model.parameters(), strict=True):
        wanted = first + (1 - 0.99**100) * (now.detach().double() - first)
        assert_close(held.double(), wanted, rtol=1e-6, atol=1e-9)
    resumed = build()
    save_file(state, tmp_path / "reference.safetensors")
    resumed.load_state(load_file(tmp_path / "reference.safetensors"))
    for _ in range(50):
        resumed.after_step()
    for again, held in zip(resumed._held[0], reference._held[0], strict=True):
        assert torch.equal(again, held)


@pytest.mark.parametrize(
    ("regime", "peft"),
    [
        ({}, None),
        ({"sync_every": 2}, None),
        ({"sync_every": 2}, {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}),
        pytest.param({}, {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
        pytest.param({"max_lag": 1}, None, marks=pytest.mark.slow),
    ],
    ids=["own weights", "a copy", "adapter, copy", "adapter", "a process"],
)  # fmt: skip
def test_an_engine_samples_in_the_dtype_that_is_saved(
    inputs: Path, regime: dict[str, Any], peft: dict[str, Any] | None
) -> None:
    """What trains is float32, what is pushed bfloat16: the probe after each push says that they agree."""
    (inputs / "plugin.py").write_text(PLUGIN)
    sections = {"peft": peft} if peft else {}
    run = train(
        recipe(
            inputs, "online", stage="preference", **sections,
            data={"train": [], "prompts": [{"path": str(inputs / "pairs.jsonl"), "format": "text"}]},
            regime={"name": "rollouts", "samples_per_prompt": 3, "max_new_tokens": 6, **regime},
            reference={"name": "ema", "ema_rate": 0.2},
            signals=[{"name": "vowels"}],
            plugins=[str(inputs / "plugin.py")],
            train={"learning_rate": 1e-3, "max_steps": 4},
            eval={
                "generation": {
                    "prompts": [{"path": str(inputs / "pairs.jsonl"), "format": "text"}],
                    "num_prompts": 2, "max_new_tokens": 4,
                }
            },
        )
    )  # fmt: skip
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss/pairs" in row]
    assert len(rows) == 4
    assert {tensor.dtype for tensor in trained(run).values()} == {torch.float32}
    for file in (run / "policies").glob("*/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_the_gradients_of_a_windows_micro_batches_add_up_in_float32(inputs: Path) -> None:
    """16 micro-batches of one row or one of 16: the same first step, but for what rows are rounded with."""
    steps = {}
    for size in (1, 16):
        settings = {"global_batch_size": 16, "micro_batch_size": size, "max_steps": 1}
        run = train(recipe(inputs, f"by-{size}", train=settings))
        (steps[size],) = [
            row["train/grad_norm"]
            for row in read_metrics(run / "metrics.jsonl")
            if "train/grad_norm" in row
        ]
    assert steps[1] == pytest.approx(steps[16], rel=2e-3)
