"""What would stop a run at its end is found at its start, or saved all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import TrainingError
from prefopt.model.rehearsal import rehearse_saving
from prefopt.training import room
from prefopt.training.room import needed_room
from tests.distributed.launch import write_model, write_recipe
from tests.recipes.commands import Prefopt
from tests.unit.tiny_models import tiny_model

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class GardenConfig(LlamaConfig):
    model_type = "garden"

class GardenForCausalLM(LlamaForCausalLM):
    config_class = GardenConfig
"""


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_generation_settings_that_contradict_themselves_are_saved_as_they_are(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    """As published: greedy beside a temperature, which transformers loads and refuses to write."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    edit(model / "generation_config.json", **odd)
    recipe = write_recipe(
        tmp_path / "full.yaml", model, inputs / "pairs.jsonl", peft=None, train={"num_epochs": 1}
    )
    code, said = command("train", recipe)
    assert code == 0, said
    assert "its generation_config.json contradicts itself (" in said
    final = tmp_path / "run" / "final"
    saved = json.loads((final / "generation_config.json").read_text())
    # False is the default, which the file of the result does not spell out.
    assert (saved["temperature"], saved["top_p"], saved.get("do_sample", False)) == (
        0.6,
        0.9,
        False,
    )
    assert AutoModelForCausalLM.from_pretrained(final).generation_config.temperature == 0.6
    adapter = write_recipe(tmp_path / "a.yaml", model, inputs / "pairs.jsonl",
                           train={"num_epochs": 1}, run={"output_dir": str(tmp_path / "a")})  # fmt: skip
    assert command("train", adapter)[0] == 0
    code, said = command("merge", tmp_path / "a", "--output", tmp_path / "merged")
    assert code == 0, said
    saved = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6


def test_a_tokenizer_that_cannot_be_saved_stops_the_run_before_its_first_step(
    command: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("this vocabulary has no file")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    said = command.refuses("train", recipe, code=1)
    assert "the tokenizer cannot be saved, so what this run trains could not be at its end" in said
    assert "NotImplementedError: this vocabulary has no file. Set model.tokenizer" in said
    run = recipe.parent / "run"
    assert not (run / "metrics.jsonl").exists() and not list(run.glob(".tmp-*"))


def test_a_configuration_that_cannot_be_saved_is_named(
    command: Prefopt, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("heads must divide the width")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", refuse)
    recipe = write_recipe(tmp_path / "r.yaml", inputs / "model", inputs / "pairs.jsonl", peft=None)
    said = command.refuses("train", recipe, code=1)
    assert "the model's config.json cannot be saved" in said and "must divide the width" in said


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingError, match=r"run\.output_dir = .*file/run: cannot be written: Not a"
    ):
        rehearse_saving(tiny_model("llama", vocab_size=32), None, tmp_path / "file" / "run")


@pytest.mark.parametrize(("free", "code"), [(10_000, 2), (120_000, 0), (10**9, 0)])
def test_a_disk_too_small_for_what_the_recipe_saves_is_said_at_the_start(
    command: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch, free: int, code: int
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found, said = command("train", recipe, "train.keep_checkpoints=50")
    assert found == code, said
    assert ("A checkpoint of this run takes about" in said) == (free < 10**9)
    assert ("that cannot be written. Make room" in said) == (code == 2)
    assert ("with train.keep_checkpoints = 50 about" in said) == (free == 120_000)


def test_what_a_checkpoint_takes_is_what_it_takes(command: Prefopt, recipe: Path) -> None:
    """The estimate against the files, of an adapter and of a whole model, within what it leaves out."""
    model = tiny_model("llama", vocab_size=1000)
    count = sum(p.numel() for p in model.parameters())
    whole = needed_room(model, "adamw", keeps_masters=False, is_peft=False)
    assert (whole.checkpoint, whole.final) == (12 * count, 4 * count)
    half = needed_room(model.to(torch.bfloat16), "adamw", keeps_masters=True, is_peft=False)
    assert (half.checkpoint, half.final) == (14 * count, 2 * count)
    assert command("train", recipe, "peft=null")[0] == 0
    checkpoint = recipe.parent / "run" / "checkpoints" / "step-1"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    weights = sizes["model.safetensors"]
    assert sizes["optimizer.bin"] == pytest.approx(2 * weights, rel=0.1)


@pytest.fixture
def garden(inputs: Path, tmp_path: Path) -> Path:
    """A model with code of its own."""
    model = write_model(tmp_path / "garden")
    (model / "garden.py").write_text(OWN_CODE)
    auto = {"AutoConfig": "garden.GardenConfig", "AutoModelForCausalLM": "garden.GardenForCausalLM"}
    edit(model / "config.json", model_type="garden", architectures=["GardenForCausalLM"],
         auto_map=auto)  # fmt: skip
    return model


def test_a_run_on_code_of_its_own_is_merged_saved_and_evaluated_as_it_was_trained(
    command: Prefopt, inputs: Path, tmp_path: Path, garden: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", garden, inputs / "pairs.jsonl", train={"num_epochs": 1}
    )
    trust = "model.trust_remote_code=true"
    said = command.refuses("train", recipe, code=1)
    assert "comes with code of its own. Read it, and where you trust it set model.trust" in said
    assert command("train", recipe, trust)[0] == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    code, said = command("merge", run, "--output", merged)
    assert code == 0, said
    assert (merged / "garden.py").is_file()
    shutil.copytree(run / "final", tmp_path / "alone")
    elsewhere = ("merge", tmp_path / "alone", "--output", tmp_path / "other")
    said = command.refuses(*elsewhere, code=1)
    assert "`prefopt merge`: --trust-remote-code" in said
    assert command(*elsewhere, "--trust-remote-code")[0] == 0
    judged = ("eval", run, "--tasks", "pair_accuracy", "--output", tmp_path / "eval",
              f"tasks.pair_accuracy.data={inputs / 'pairs.jsonl'}")  # fmt: skip
    code, said = command(*judged)
    assert code == 0, said
    full = (recipe, trust, "peft=null", f"run.output_dir={tmp_path / 'full'}")
    code, said = command("train", *full)
    assert code == 0, said
    assert (tmp_path / "full" / "final" / "garden.py").is_file()


def test_an_adapter_whose_base_is_gone_says_which_and_what_to_do(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    recipe = write_recipe(
        tmp_path / "r.yaml", model, inputs / "pairs.jsonl", train={"num_epochs": 1}
    )
    assert command("train", recipe)[0] == 0
    model.rename(tmp_path / "moved")
    merge = ("merge", tmp_path / "run", "--output", tmp_path / "merged")
    said = command.refuses(*merge, code=1)
    final = tmp_path / "run" / "final"
    assert f"{final} is an adapter, and its base is not there: model '{model}'" in said
    assert f"set base_model_name_or_path in {final / 'adapter_config.json'} to where it" in said
    edit(final / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
    assert command(*merge)[0] == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_flipped_byte_in_the_result_is_noticed_wherever_it_is_loaded(
    command: Prefopt, inputs: Path, tmp_path: Path, tuning: str
) -> None:
    """safetensors loads it without a word; a settings file may be edited."""
    recipe = write_recipe(
        tmp_path / "r.yaml", inputs / "model", inputs / "pairs.jsonl", train={"num_epochs": 1}
    )
    assert command("train", recipe, *([] if tuning == "lora" else ["peft=null"]))[0] == 0
    final = tmp_path / "run" / "final"
    again = (
        "train",
        recipe,
        f"model.path={final}",
        "peft=null",
        f"run.output_dir={tmp_path / 'b'}",
    )
    edit(final / "tokenizer_config.json", added="by hand")
    assert command(*again)[0] == 0
    shutil.rmtree(tmp_path / "b")
    (weights,) = final.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    merge = ("merge", final, "--output", tmp_path / "merged")
    for words in (again, merge) if tuning == "lora" else (again,):
        said = command.refuses(*words, code=1)
        assert f"{final}: {weights.name} is not what was written: its bytes changed" in said
        assert "delete prefopt_files.json where they were changed on purpose" in said
    (final / "prefopt_files.json").unlink()
    assert command(*again)[0] == 0
