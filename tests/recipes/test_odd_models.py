"""Models, references and templates that do not go together, through the command line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from prefopt.cli import main
from tests.distributed.launch import write_model, write_recipe
from tests.recipes.commands import Prefopt, run
from tests.unit.tiny_models import tiny_config, tiny_model
from tests.unit.tiny_tokenizers import TEMPLATES, make_tokenizer

STEADY = {"num_epochs": None, "max_steps": 1, "warmup_frac": 0.0, "lr_scheduler": "constant"}


def saved(
    directory: Path, *, vocab_size: int = 400, rows: int | None = None, **settings: Any
) -> Path:
    """A tiny Llama with ``rows`` embedding rows and a tokenizer of ``vocab_size`` tokens."""
    tokenizer = make_tokenizer(vocab_size=vocab_size)
    tiny_model("llama", rows or len(tokenizer), **settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def reference_of(path: Path) -> dict[str, str]:
    return {"name": "model", "path": str(path)}


def test_a_reference_with_too_few_embedding_rows_is_named(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    other = saved(tmp_path / "other", vocab_size=300)
    recipe = write_recipe(
        tmp_path / "r.yaml", inputs / "model", inputs / "pairs.jsonl", train=STEADY, reference=reference_of(other)
    )  # fmt: skip
    assert "reference.path: the model has 300 embedding rows" in command.refuses("check", recipe)
    said = command.refuses("train", recipe, code=1)
    assert f"reference.path = '{other}': has 300 embedding rows, and the policy's tokenizer" in said


def test_a_reference_whose_ids_are_other_tokens_is_refused(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    """Of the same size: every log-prob is a number, of another text."""
    other = saved(tmp_path / "other")
    own = make_tokenizer()
    text = (other / "tokenizer.json").read_text()
    a, b = '"a":', '"b":'
    ids = {each: own.convert_tokens_to_ids(each) for each in "ab"}
    text = text.replace(f"{a}{ids['a']}", f"{a}X").replace(f"{a} {ids['a']}", f"{a} X")
    text = text.replace(f"{b}{ids['b']}", f"{b}{ids['a']}").replace(
        f"{b} {ids['b']}", f"{b} {ids['a']}"
    )
    (other / "tokenizer.json").write_text(text.replace("X", str(ids["b"])))
    recipe = write_recipe(
        tmp_path / "r.yaml", inputs / "model", inputs / "pairs.jsonl", train=STEADY, reference=reference_of(other)
    )  # fmt: skip
    said = command.refuses("train", recipe, code=1)
    assert (
        f"has another tokenizer: 'a' has id {ids['a']} for the policy and {ids['b']} there" in said
    )


def test_a_row_beyond_learnt_positions_is_refused_and_beyond_rope_is_said(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    learnt = tmp_path / "learnt"
    make_tokenizer().save_pretrained(learnt)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(learnt)
    computed = saved(tmp_path / "computed", max_position_embeddings=8)
    recipe = write_recipe(
        tmp_path / "r.yaml", learnt, inputs / "pairs.jsonl", train=STEADY, peft=None
    )  # fmt: skip
    said = command.refuses("train", recipe)
    assert "tokens, and the model has 8 positions (max_position_embeddings)" in said
    assert "data.max_length_tokens: the longest row has" in said
    code, said = command("train", recipe, f"model.path={computed}")
    assert code == 0 and "beyond them it was not trained" in said


def test_weights_that_are_not_numbers_are_named(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(inputs / "model", broken)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(
        tmp_path / "r.yaml", broken, inputs / "pairs.jsonl", train=STEADY, peft=None
    )
    said = command.refuses("train", recipe, code=1)
    assert f"1 tensors of the model hold NaN or infinite values, e.g. ['{name}']" in said


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_embeddings_is_merged_as_it_was_trained(
    target: str, command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    tied = saved(tmp_path / "tied", tie_word_embeddings=True)
    adapter = {"type": "lora", "r": 4, "target_modules": ["q_proj", target]}
    train = {**STEADY, "learning_rate": 0.05, "max_steps": 2}
    recipe = write_recipe(
        tmp_path / "r.yaml", tied, inputs / "pairs.jsonl", train=train, peft={"lora_alpha": None, **adapter}
    )  # fmt: skip
    assert command("train", recipe)[0] == 0
    assert command("merge", tmp_path / "run", "--output", tmp_path / "merged")[0] == 0
    ids = torch.arange(6, 26)[None]
    base = AutoModelForCausalLM.from_pretrained(tied)
    unmerged = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "final"))
    with torch.no_grad():
        want, got = (
            model(input_ids=ids).logits
            for model in (unmerged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        )
        plain = AutoModelForCausalLM.from_pretrained(tied)(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (plain - want).abs().max() > 1e-2


def test_that_a_runs_only_step_is_its_warm_up_is_said(command: Prefopt, recipe: Path) -> None:
    """At rate 0, as transformers' schedulers begin: every metric is there, and no weight moves."""
    code, said = command("train", recipe, "train.warmup_frac=0.1")
    assert code == 0
    assert "train.warmup_frac = 0.1: the run has 1 step" in said
    said = command("train", recipe, f"run.output_dir={recipe.parent / 'other'}")[1]
    assert "learning rate is 0" not in said


def test_who_may_read_what_is_saved_is_the_umasks_to_say(command: Prefopt, recipe: Path) -> None:
    """safetensors makes its files private: of a group's model all but the weights could be read."""
    assert command("train", recipe)[0] == 0
    run = recipe.parent / "run"
    mask = os.umask(0)
    os.umask(mask)
    files = [
        path
        for part in ("final", "checkpoints")
        for path in (run / part).rglob("*")
        if path.is_file()
    ]
    assert {path.suffix for path in files} > {".safetensors", ".json"}
    odd = {path.name for path in files if stat.S_IMODE(path.stat().st_mode) != 0o666 & ~mask}
    assert not odd


def test_check_sees_missing_shards_a_broken_template_and_ids_without_rows(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    write_model(model)
    (model / "model.safetensors").unlink()
    tiny_model("llama", vocab_size=390).save_pretrained(model, max_shard_size="40KB")
    sorted(model.glob("model-*.safetensors"))[1].unlink()
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")
    recipe = write_recipe(tmp_path / "r.yaml", model, inputs / "pairs.jsonl", peft=None)
    said = command.refuses("check", recipe, "data.train.0.format=chat")
    assert "the chat template is broken: line 1" in said
    assert "files that its index names, e.g. model-00002-of-" in said
    assert "the model has 390 embedding rows (vocab_size), and the tokenizer in" in said


def test_a_classifier_of_several_labels_is_no_reward_model(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "classifier"
    make_tokenizer().save_pretrained(path)
    LlamaForSequenceClassification(tiny_config("llama", 400, num_labels=3)).save_pretrained(path)
    recipe = write_recipe(
        tmp_path / "r.yaml", path, inputs / "pairs.jsonl", train=STEADY, peft=None, objective=None
    )
    recipe.write_text(recipe.read_text() + "stage: reward_model\n")
    said = command.refuses("train", recipe, code=1)
    assert "a LlamaForSequenceClassification with 3 labels, and a reward model has one" in said


def test_the_dropout_of_a_configuration_is_saved_as_it_came(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    """It is off in training; whoever fine-tunes the result further would have lost it without a word."""
    model = saved(tmp_path / "model", attention_dropout=0.25)
    recipe = write_recipe(
        tmp_path / "r.yaml", model, inputs / "pairs.jsonl", train=STEADY, peft=None
    )
    assert command("train", recipe)[0] == 0
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["attention_dropout"] == 0.25
    assert config["use_cache"] is True


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_rank_of_modules_that_are_not_there_is_refused(
    key: str, command: Prefopt, recipe: Path
) -> None:
    said = command.refuses("train", recipe, f"peft.{key}={{'q_proj': 2, 'w_proj': 8}}")
    assert f"peft.{key}.w_proj: no module that the adapter is put on is called so" in said
    assert command("train", recipe, f"peft.{key}={{'layers.0.*q_proj': 2}}")[0] == 0


def test_paths_that_mean_something_else_are_told(
    command: Prefopt, recipe: Path, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert command("train", recipe)[0] == 0
    for override, said in {
        "run.output_dir=$SCRATCH/run": "a directory would be called $SCRATCH: variables are not filled in",
        "model.path=${HUB}/llama": "no such directory: it is looked for under ${HUB}",
        f"run.output_dir={tmp_path / 'link'}": f"is a link to {tmp_path / 'nowhere'}, which is not there",
        f"model.path={tmp_path / 'run'}": f"its result is the adapter {tmp_path / 'run' / 'final'}",
        f"model.path={inputs / 'model' / 'model.safetensors'}": "is a file, and a directory is needed",
    }.items():
        assert said in command.refuses("check", recipe, override)


@pytest.mark.parametrize("count", ["0", "-2", "2.5"])
def test_a_number_of_processes_is_a_number(count: str, recipe: Path) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(recipe), "--num-processes", count])


@pytest.mark.parametrize(
    ("key", "known"), [("target_modules", "did you mean 'q_proj'"), ("modules_to_save", "lm_head")]
)
def test_training_refuses_a_module_that_is_not_there_beside_some_that_are(
    key: str, known: str, command: Prefopt, recipe: Path
) -> None:
    said = command.refuses("train", recipe, f"peft.{key}=[lm_head, q_prj]")
    assert f"peft.{key}: no module of the model is called 'q_prj'" in said and known in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [("checkpoints", "directory"), ("metrics.jsonl", "file"), ("run.json", "file")],
)
def test_what_is_in_the_way_of_a_run_is_found_before_its_first_step(
    name: str, kind: str, command: Prefopt, recipe: Path
) -> None:
    path = recipe.parent / "run" / name
    path.parent.mkdir()
    path.mkdir() if kind == "file" else path.write_text("mine")
    assert f"{path} stands where the run writes a {kind}, and is none" in command.refuses(
        "check", recipe
    )


def test_a_byte_order_mark_of_a_chat_template_is_no_part_of_the_prompts(
    command: Prefopt, inputs: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = recipe.parent / "chat.jinja"
    template.write_text("\ufeff" + TEMPLATES["chatml"], encoding="utf-8")
    for name in ("with", "without"):
        chosen = [f"model.chat_template={template}", "data.train.0.format=chat"]
        assert main(["show", str(recipe), "--no-color", "-n", "1", *chosen]) == 0
        said = capfd.readouterr().out
        assert "ï»¿" not in said.replace("│", "") and "prompt (" in said, name
        template.write_text(TEMPLATES["chatml"], encoding="utf-8")


def test_output_that_a_terminal_cannot_write_is_escaped(recipe: Path) -> None:
    """A locale that is not UTF-8, or a pipe that is told to be ASCII: a traceback amid a page."""
    log = recipe.parent / "log"
    code, said = run("keys", log=log, entry=_in_ascii)
    assert code == 0, said
    assert "\\u2026" in said and "run.stuck_after_s" in said


def _in_ascii(arguments: Sequence[str]) -> int:
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="ascii")
    code = main(arguments)
    sys.stdout.flush()
    return code


def test_a_reward_models_adapter_is_merged_with_its_head(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", inputs / "model", inputs / "pairs.jsonl", train=STEADY, objective=None
    )
    recipe.write_text(recipe.read_text() + "stage: reward_model\n")
    assert command("train", recipe)[0] == 0
    assert command("merge", tmp_path / "run", "--output", tmp_path / "merged")[0] == 0
    head = "score.weight"
    trained = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[head], trained[f"base_model.model.{head}"])
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not found["missing_keys"] and model.config.num_labels == 1


def test_weights_that_are_a_pickle_of_code_or_cut_off_are_one_sentence(
    command: Prefopt, inputs: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    (model / "model.safetensors").unlink()
    recipe = write_recipe(tmp_path / "r.yaml", model, inputs / "pairs.jsonl", train=STEADY)
    for content in (pickle.dumps(print), b"", b"PK"):
        (model / "pytorch_model.bin").write_bytes(content)
        assert f"cannot load the model '{model}'" in command.refuses("train", recipe, code=1)
