"""Bad input through the command line: the message names the culprit and the way out, and no traceback.

`main` runs in this process where that is enough; tests/recipes/test_interrupted_runs.py has what needs to be
killed or to run out of disk.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from tests.distributed.launch import write_model, write_pairs, write_recipe
from tests.recipes.commands import Prefopt, prefopt
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

# --- the recipe ----------------------------------------------------------------------------------


def test_misspelt_keys_are_reported_at_once_each_with_its_line_and_the_right_name(
    command: Prefopt, recipe: Path
) -> None:
    text = recipe.read_text()
    for right, wrong in (
        ("learning_rate", "lerning_rate"),
        ("lora_alpha", "lora_alhpa"),
        ("beta", "bta"),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    recipe.write_text(text + "optimiser: adamw\n")
    said = command.refuses("train", recipe, "model.layuot=packed")
    lines = {word: 1 + text[: text.index(word)].count("\n") for word in ("lerning", "alhpa", "bta")}
    for line in (
        f"line {lines['lerning']}: train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        f"line {lines['alhpa']}: peft.lora_alhpa = 8: unknown key of peft's LoraConfig; did you mean "
        "'lora_alpha'?",
        f"line {lines['bta']}: objective.bta: unknown key; did you mean 'beta'?",
        f"line {text.count(chr(10)) + 1}: optimiser: unknown key",
        "override: model.layuot: unknown key; did you mean 'layout'?",
    ):
        assert line in said
    assert said.startswith(f"{recipe}: 6 problems\n")
    assert ": train.learning_rate is missing: Peak learning rate." in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=x", "train.seed = 'x': must be a whole number"),
        ("train.global_batch_size=2.5", "train.global_batch_size = 2.5: must be a whole number"),
        ('train.max_steps="5"', "train.max_steps = '5': must be a whole number, without quotes"),
        ("train.learning_rate=-1", "train.learning_rate = -1: must be > 0"),
        ("data.train=pairs.jsonl", "data.train = 'pairs.jsonl': must be a list"),
        ("peft.r=big", "peft.r = 'big': must be a whole number (peft's LoraConfig)"),
        ("objective.beta=[1]", "objective.beta: must be a number"),
        ("objective.name=dop", "objective.name = 'dop': unknown; did you mean 'dpo'?"),
        (
            "train.precision=fp8",
            "train.precision = 'fp8': must be 'auto', 'fp32', 'bf16' or 'fp16'",
        ),
    ],
)
def test_wrong_values_say_what_they_must_be(
    command: Prefopt, recipe: Path, override: str, message: str
) -> None:
    assert f"override: {message}" in command.refuses("train", recipe, override)


def test_missing_files_are_reported_at_once_with_the_nearest_name(
    command: Prefopt, recipe: Path, inputs: Path, tmp_path: Path
) -> None:
    missing = {
        "data.train.0.path": (inputs / "pears.jsonl", f"did you mean {inputs / 'pairs.jsonl'}?"),
        "model.path": (inputs / "modle", f"did you mean {inputs / 'model'}?"),
        "model.chat_template": (tmp_path / "chat.jinja", "it takes a Jinja file"),
        "train.resume": (tmp_path / "step-7", "no such checkpoint directory"),
    }
    said = command.refuses("train", recipe, *(f"{k}={path}" for k, (path, _) in missing.items()))
    for key, (path, hint) in missing.items():
        (line,) = (
            line for line in said.splitlines() if f"override: {key} = '{path}': no such" in line
        )
        assert hint in line
    assert "no such file; give the path of a YAML recipe" in command.refuses(
        "train", tmp_path / "x"
    )
    assert not (tmp_path / "run").exists()


def test_fp16_on_a_machine_without_a_gpu_is_refused(
    command: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = command.refuses("train", recipe, "train.precision=fp16")
    assert "train.precision = 'fp16': needs a CUDA device, and this machine has none." in said
    assert "Use bf16 or fp32" in said


# --- the rows ------------------------------------------------------------------------------------


def damaged(inputs: Path, path: Path, line: str, *, at: int) -> Path:
    """The pairs with ``line`` in place of line ``at`` (from 1)."""
    lines = (inputs / "pairs.jsonl").read_text().splitlines()
    lines[at - 1] = line
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b", ', "{path}:5: broken JSON: Expecting property name"),
        ("[1, 2]", "{path}:5: a row must be an object with named columns, this is an array of 2"),
        (
            '{"prompt": "a", "chosen": "b"}',
            "pairs.jsonl:5: no column 'rejected'; it has prompt, chosen",
        ),
        (
            '{"prompt": "a", "chosen": 5, "rejected": "c"}',
            "pairs.jsonl:5: column 'chosen' holds int 5",
        ),
    ],
    ids=["broken", "no-object", "missing-column", "wrong-type"],
)
def test_row_that_cannot_be_read_is_named_by_file_and_line(
    command: Prefopt, recipe: Path, inputs: Path, tmp_path: Path, line: str, message: str
) -> None:
    path = damaged(inputs, tmp_path / "pairs.jsonl", line, at=5)
    said = command.refuses("train", recipe, f"data.train.0.path={path}", code=1)
    assert message.format(path=path) in said
    assert not (tmp_path / "run").exists()


def test_archive_that_was_cut_off_is_named(
    command: Prefopt, recipe: Path, inputs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress((inputs / "pairs.jsonl").read_bytes())[:-20])
    said = command.refuses("train", recipe, f"data.train.0.path={path}", code=1)
    assert f"{path}: the gzip archive is damaged or cut off" in said


def test_unusable_rows_are_counted_and_listed_and_the_run_goes_on(
    command: Prefopt, recipe: Path, inputs: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "one two", "chosen": " a cat", "rejected": " a cat"},
        {"prompt": "one two", "chosen": " ", "rejected": " a cat"},
        {"prompt": "one two", "chosen": " a cat", "rejected": ""},
        {"prompt": "one two", "chosen": " a cat", "rejected": " sun" * 3000},
    ]
    path = tmp_path / "pairs.jsonl"
    good = (inputs / "pairs.jsonl").read_text()
    path.write_text(good + "".join(json.dumps(row) + "\n" for row in rows))
    code, said = command("train", recipe, f"data.train.0.path={path}")
    assert code == 0, said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    counts = {"identical": 1, "empty_chosen": 1, "empty_rejected": 1, "too_long": 1}
    assert (record["data"]["train_rows"], record["data"]["rejects"]) == (8, counts)
    listed = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").open()]
    assert [(line["row"], line["reason"]) for line in listed] == [
        (9, "identical"), (10, "empty_chosen"), (11, "empty_rejected"), (12, "too_long")
    ]  # fmt: skip


def test_data_of_which_no_row_is_left_says_why(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    said = command.refuses("train", recipe, "data.max_length_tokens=3", code=1)
    assert (
        "no row is left (rejected: too_long 8). Most are too_long: raise data.max_length_tokens"
        in said
    )
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert f"{empty}: holds no rows" in command.refuses(
        "train", recipe, f"data.train.0.path={empty}", code=1
    )


def test_chat_rows_need_a_tokenizer_with_a_chat_template(command: Prefopt, recipe: Path) -> None:
    said = command.refuses("train", recipe, "data.train.0.format=chat", code=1)
    assert "the tokenizer has no chat template to render them with" in said
    assert "set model.chat_template to a Jinja file" in said


# --- models and adapters -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on ``model``, and two models beside it that are not its base."""
    directory = tmp_path_factory.mktemp("adapter")
    train = {"num_epochs": 1}
    recipe = write_recipe(
        directory / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl", train=train
    )
    assert main(["train", str(recipe)]) == 0
    write_model(inputs / "retrained", seed=1)
    tiny_model("llama", vocab_size=len(make_tokenizer()), seed=1).save_pretrained(
        inputs / "retrained"
    )
    narrow = tiny_model("llama", vocab_size=len(make_tokenizer()), hidden_size=16)
    narrow.save_pretrained(inputs / "narrow")
    make_tokenizer().save_pretrained(inputs / "narrow")
    return directory / "run" / "final"


@pytest.mark.parametrize("other", ["retrained", "narrow"])
def test_adapter_of_another_base_is_refused_even_where_its_shapes_fit(
    command: Prefopt, recipe: Path, inputs: Path, adapter: Path, other: str
) -> None:
    said = command.refuses(
        "train", recipe, f"peft={{adapter: {adapter}}}", f"model.path={inputs / other}", code=1
    )
    assert (
        f"'{adapter}' is an adapter for another base: it was trained on '{inputs / 'model'}'"
        in said
    )
    assert f"this is '{inputs / other}'" in said
    assert "Set model.path to the adapter's base" in said


def test_adapter_of_another_base_that_kept_no_hash_is_refused_by_its_name(
    command: Prefopt, recipe: Path, inputs: Path, adapter: Path, tmp_path: Path
) -> None:
    """An adapter from elsewhere has no record of ours: the name in its config is all there is."""
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "prefopt_base.json").unlink()
    overrides = (f"peft={{adapter: {foreign}}}", f"model.path={inputs / 'retrained'}")
    said = command.refuses("check", recipe, *overrides)
    assert (
        f"an adapter for another base: it was trained on {inputs / 'model'}, and model.path is"
        in said
    )
    assert "correct base_model_name_or_path in its adapter_config.json" in said
    missing = command.refuses("check", recipe, f"peft={{adapter: {tmp_path / 'none'}}}")
    assert "is not a saved adapter" in missing and "is not a directory" in missing


# --- processes -----------------------------------------------------------------------------------


_RANK_0 = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


def test_batch_that_does_not_divide_names_the_nearest_that_do(
    command: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "train.global_batch_size = 5: does not divide over 2 processes"
    said = command.refuses("check", recipe, "train.global_batch_size=5", "--num-processes", 2)
    assert message in said and "Use 4 or 6" in said
    for name, value in _RANK_0.items():  # as every process of a launch finds it, before they meet
        monkeypatch.setenv(name, value)
    said = command.refuses("train", recipe, "train.global_batch_size=5")
    assert message in said and "Use 4 or 6" in said


def test_more_processes_than_pairs_are_refused_by_every_one_of_them(
    recipe: Path, tmp_path: Path
) -> None:
    """Two processes, one pair: known only once the rows are read. Neither may wait for the other."""
    one = tmp_path / "one.jsonl"
    write_pairs(one, 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def launched(rank: int) -> Any:
        return prefopt(
            "train", str(recipe), f"data.train.0.path={one}",
            log=tmp_path / f"log-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true",
        )  # fmt: skip

    with launched(0) as first, launched(1) as second:
        codes = first.wait(), second.wait()
        said = first.output
        assert codes == (2, 2), said + second.output
        assert "2 processes share a global batch of 1 pairs (1 in the data)" in said
        assert "start fewer processes" in said
        assert "Traceback" not in said + second.output
        assert "share a global batch" not in second.output  # one of each machine says so
