"""Whole runs from recipes on disk: references, adapters, the store, what is left behind."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefopt.data import load_data
from prefopt.errors import ConfigError
from prefopt.model.collate import pack
from prefopt.model.load import load_policy, load_tokenizer
from prefopt.model.logps import LogpModel
from prefopt.recipe import load_recipe
from prefopt.reference.store import ReferenceStore
from prefopt.training.metrics import read_metrics
from prefopt.wiring import train
from tests.distributed.launch import write_model, write_pairs, write_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_model(directory / "other", seed=1)
    write_pairs(directory / "pairs.jsonl", 24)
    return directory


def recipe_at(directory: Path, inputs: Path, **sections: object) -> Path:
    directory.mkdir(exist_ok=True)
    sections.setdefault("train", {"num_epochs": 1})
    return write_recipe(
        directory / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl", **sections
    )


def first_groups(recipe: Path, count: int = 4) -> list:
    loaded = load_recipe(recipe)
    data = load_data(loaded.data, load_tokenizer(loaded.model))
    return [data.train.group(i) for i in range(count)]


def logps_of(model: torch.nn.Module, groups: list) -> torch.Tensor:
    with torch.no_grad():
        return LogpModel(model.eval())(pack(groups))


def stored(recipe: Path, groups: list) -> torch.Tensor:
    """The reference log-probs the run left in its store, as the (R, T) of `logps_of`."""
    (directory,) = (recipe.parent / "cache" / "reference").iterdir()
    record = json.loads((recipe.parent / "run" / "run.json").read_text())
    store = ReferenceStore(recipe.parent / "cache", record["weights"]["hash"])
    assert store.directory == directory
    arrays = [torch.from_numpy(a) for group in groups for a in store.get(group)]
    return torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True)


def computed(caplog: pytest.LogCaptureFixture) -> str:
    lines = [
        r.getMessage() for r in caplog.records if r.getMessage().startswith("reference log-probs")
    ]
    caplog.clear()
    return lines[-1].removeprefix("reference log-probs: ")


def test_second_run_computes_no_reference_forward(
    tmp_path: Path, inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another loss, learning rate, seed and output directory; then a store that was deleted."""
    caplog.set_level(logging.INFO)
    recipe = recipe_at(tmp_path, inputs)
    train(recipe)
    assert computed(caplog) == "computed 24 of 24 groups"
    other = ["objective.name=ipo", "train.learning_rate=1e-4", "train.seed=7"]
    train(recipe, [*other, f"run.output_dir={tmp_path / 'other'}"])
    assert computed(caplog) == "computed 0 of 24 groups"
    losses = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "cache" / "reference")
    train(recipe, [f"run.output_dir={tmp_path / 'again'}"])
    assert computed(caplog) == "computed 24 of 24 groups"
    again = read_metrics(tmp_path / "again" / "metrics.jsonl")
    assert [r["loss/total"] for r in again] == [r["loss/total"] for r in losses]


def test_run_directory_says_what_ran(tmp_path: Path, inputs: Path) -> None:
    run = train(recipe_at(tmp_path, inputs))
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["objective"] == {"name": "dpo", "beta": 0.1}
    assert record["steps"] == 3 and record["layout"] == "packed" and record["processes"] == 1
    assert {"hash", "description"} <= record["weights"].keys() and len(
        record["weights"]["hash"]
    ) == 64
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["data"]["order_hash"]) == 64
    assert (run / "rejects.jsonl").read_text() == ""


def test_saved_adapter_is_the_trained_policy(tmp_path: Path, inputs: Path) -> None:
    """What was trained (its last logged log-probs) is what a stranger loads from final/."""
    held_out = shutil.copy(inputs / "pairs.jsonl", tmp_path / "held_out.jsonl")
    recipe = recipe_at(tmp_path, inputs, data={"eval": [{"path": str(held_out)}]})
    run = train(recipe)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    policy = PeftModel.from_pretrained(base, run / "final")
    groups = first_groups(recipe, 24)
    sums = logps_of(policy, groups).sum(-1)
    rows = torch.arange(0, 48, 2)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["eval/logps/chosen"] == pytest.approx(sums[rows].mean().item(), rel=1e-5)
    assert (run / "final" / "tokenizer.json").is_file()


def test_reference_of_a_continued_adapter_is_that_adapter(tmp_path: Path, inputs: Path) -> None:
    """Peers take the bare base here (field.md 8); the log-ratio at step 0 would not be 0."""
    first = recipe_at(tmp_path / "first", inputs, train={"learning_rate": 3e-2, "num_epochs": 1})
    adapter = train(first) / "final"
    second = recipe_at(tmp_path / "second", inputs)
    overrides = [f"peft={{adapter: {adapter}}}"]
    train(second, overrides)
    groups = first_groups(second)
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    bare = logps_of(base, groups)
    own = logps_of(PeftModel.from_pretrained(base, adapter), groups)
    assert (own - bare).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(stored(second, groups), own, rtol=0, atol=1e-5)
    start = read_metrics(tmp_path / "second" / "run" / "metrics.jsonl")[0]
    assert start["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert start["loss/total"] == pytest.approx(0.693147, abs=1e-4)


def test_full_fine_tuning_keeps_its_start_as_reference(tmp_path: Path, inputs: Path) -> None:
    recipe = recipe_at(tmp_path, inputs, peft=None, train={"num_epochs": 1, "learning_rate": 1e-3})
    run = train(recipe)
    groups = first_groups(recipe)
    start = AutoModelForCausalLM.from_pretrained(inputs / "model")
    torch.testing.assert_close(stored(recipe, groups), logps_of(start, groups), rtol=0, atol=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(run / "final")
    assert (logps_of(trained, groups) - logps_of(start, groups)).abs().max() > 0.01


def test_another_model_as_reference(tmp_path: Path, inputs: Path) -> None:
    """Log-ratios at step 0 are those of policy and other model, by their own log-probs."""
    reference = {"name": "model", "path": str(inputs / "other")}
    recipe = recipe_at(
        tmp_path, inputs, reference=reference, train={"num_epochs": 1, "global_batch_size": 24}
    )
    run = train(recipe)
    groups = first_groups(recipe, 24)
    models = [AutoModelForCausalLM.from_pretrained(inputs / name) for name in ("model", "other")]
    policy, other = (logps_of(model, groups).sum(-1) for model in models)
    row = read_metrics(run / "metrics.jsonl")[0]
    chosen = torch.arange(0, 48, 2)
    assert row["log_ratio/chosen"] == pytest.approx(
        (policy - other)[chosen].mean().item(), rel=1e-4
    )


def test_finished_run_started_again_trains_nothing(tmp_path: Path, inputs: Path) -> None:
    recipe = recipe_at(tmp_path, inputs)
    train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(recipe)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match=r"train.resume = never.*step-3"):
        train(recipe, ["train.resume=never"])


def test_policy_loads_the_same_twice(inputs: Path) -> None:
    """Every process builds its own copy: fresh adapters must agree without a broadcast."""
    recipe = load_recipe_section(inputs)
    states = [load_policy(*recipe, seed=3).model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def load_recipe_section(inputs: Path) -> tuple:
    from prefopt.recipe.schema import ModelSection, PeftSection

    return ModelSection(path=str(inputs / "model")), PeftSection(type="lora", r=4)
