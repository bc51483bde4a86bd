"""Starting into a run directory that holds a run: gone on with, or refused and left as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.distributed.launch import write_pairs
from tests.recipes.commands import Prefopt

ACCEPT = "train.accept_changes=true"


@pytest.fixture
def used(recipe: Path, command: Prefopt) -> Path:
    """The checkpoint of the one step of ``recipe``."""
    code, said = command("train", recipe)
    assert code == 0, said
    return recipe.parent / "run" / "checkpoints" / "step-1"


def test_never_resuming_into_a_used_directory_is_refused(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    before = (used.parents[1] / "metrics.jsonl").read_text()
    said = command.refuses("train", recipe, "train.resume=never")
    assert (
        f"train.resume = never: {used.parents[1]} holds a run with checkpoints up to step-1" in said
    )
    assert "use another run.output_dir, delete it, or go on with train.resume = auto" in said
    assert (used.parents[1] / "metrics.jsonl").read_text() == before


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


def everything(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("train.learning_rate=0.5", ["train.learning_rate = 0.5: was 0.001 when the weights of"]),
        ("train.lr_scheduler=cosine", ["train.lr_scheduler = 'cosine': was 'constant'"]),
        ("objective={name: simpo}", ["objective.name = 'simpo': was 'dpo'", "objective.beta"]),
        ("objective.beta=0.3", ["objective.beta = 0.3: was 0.1 when"]),
        ("train.adam_beta2=0.95", ["train.adam_beta2 = 0.95: was 0.999 when"]),
        ("peft=null", ["peft: was "]),
        ("peft.r=8", ["peft.r = 8: was 4 when"]),
        ("data.train.0.max_rows=4", ["data.train.0.max_rows = 4: was null when"]),
        ("stage=sft", ["stage = 'sft': was 'preference'"]),
    ],
)
def test_other_settings_are_refused_one_by_one_and_nothing_is_touched(
    command: Prefopt, recipe: Path, used: Path, override: str, changes: list[str]
) -> None:
    """They used to train nothing, say "saved and verified", and write a record of what had made no weights."""
    run = used.parents[1]
    before = everything(run)
    more = ["objective=null"] if override == "stage=sft" else []
    for words in (["train", recipe], ["check", recipe]):
        said = command.refuses(*words, override, *more)
        for change in changes:
            assert change in said
        assert (
            f"run.output_dir = '{run}': holds a run of other settings (above), finished after 1"
            in said
        )
        assert "use another run.output_dir, or set train.accept_changes=true" in said
    assert everything(run) == before


def test_accepted_changes_are_gone_on_with_and_both_stand_in_the_record(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    run = used.parents[1]
    slower = ("train.learning_rate=1e-4", "train.num_epochs=2")
    code, said = command("train", recipe, *slower, ACCEPT)
    assert (
        code == 0 and "going on with another setting: train.learning_rate: 0.001 → 0.0001" in said
    )
    record = json.loads((run / "run.json").read_text())
    (entry,) = record["history"]
    assert entry["step"] == 1
    assert {"key": "train.learning_rate", "was": 1e-3, "now": 1e-4} in entry["changed"]
    assert record["recipe"]["train"]["learning_rate"] == 1e-4
    assert record["finished"] == {"step": 2}
    # What was accepted is the run's: neither the flag again, nor the old settings without it.
    assert command("train", recipe, *slower, "train.num_epochs=3")[0] == 0
    said = command.refuses("train", recipe, "train.num_epochs=4")
    assert "train.learning_rate = 0.001: was 0.0001" in said
    record = json.loads((run / "run.json").read_text())
    assert record["history"][0] == entry and len(record["history"]) == 2


def test_a_finished_run_says_so_and_is_left_alone(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    run = used.parents[1]
    before = everything(run)
    # What does not decide the weights changes nothing; neither do checkpoints that were deleted.
    for overrides in ([], ["train.micro_batch_size=2", "train.log_every=5", "data.num_workers=2"]):
        code, said = command("train", recipe, *overrides)
        assert code == 0 and "finished after 1 steps: nothing is left to train" in said
        assert "resumed from" not in said and "saved and verified" not in said
        assert everything(run) == before
    shutil.rmtree(run / "checkpoints")
    assert "nothing is left to train" in command("train", recipe)[1]
    said = command.refuses("train", recipe, "train.learning_rate=1", ACCEPT)
    assert (
        "holds the final/ of a run that finished after 1 steps, and no checkpoint to go on" in said
    )
    assert "train.resume = never" in command.refuses("train", recipe, "train.resume=never")


def test_a_longer_run_is_the_same_run_where_no_step_depends_on_the_length(
    command: Prefopt, recipe: Path, used: Path, tmp_path: Path
) -> None:
    run, calm = used.parents[1], tmp_path / "calm"
    assert command("train", recipe, "train.num_epochs=3", "train.micro_batch_size=2")[0] == 0
    assert command("train", recipe, "train.num_epochs=3", f"run.output_dir={calm}")[0] == 0
    assert_close(weights(run), weights(calm), rtol=1e-6, atol=1e-7)
    said = command.refuses("train", recipe)
    assert "train.num_epochs = 1.0: gives 1 steps, and the run in" in said and "has done 3" in said


def test_a_longer_run_on_a_schedule_is_another_one(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    cosine = ("train.lr_scheduler=cosine",)
    assert command("train", recipe, *cosine)[0] == 0
    said = command.refuses("train", recipe, *cosine, "train.num_epochs=2")
    assert "train.num_epochs = 2.0: was 1.0" in said
    assert command("train", recipe, *cosine, "train.num_epochs=2", ACCEPT)[0] == 0


def test_other_rows_and_other_weights_under_the_same_names_are_refused(
    command: Prefopt, recipe: Path, used: Path, inputs: Path, tmp_path: Path
) -> None:
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(inputs / "model", model)
    shutil.copy(inputs / "pairs.jsonl", pairs)
    own = (
        f"model.path={model}",
        f"data.train.0.path={pairs}",
        f"run.output_dir={tmp_path / 'own'}",
    )
    assert command("train", recipe, *own)[0] == 0
    before = everything(tmp_path / "own")
    held = load_file(model / "model.safetensors")
    held["lm_head.weight"][0, 0] += 1
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    said = command.refuses("train", recipe, *own, "train.num_epochs=2")
    assert "the weights at model.path: " in said
    shutil.copytree(inputs / "model", model, dirs_exist_ok=True)
    write_pairs(pairs, 8, seed=1)
    for overrides in ([], ["train.num_epochs=2"]):
        said = command.refuses("train", recipe, *own, *overrides)
        assert "the rows of data.train: " in said and "train.accept_changes=true" in said
    assert everything(tmp_path / "own") == before


def test_a_plugin_that_does_something_else_is_another_setting(
    command: Prefopt, recipe: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "used_plugin.py"
    plugin.write_text("# nothing\nSCALE = 1\n")
    own = f"plugins=[{plugin.name}]"
    assert command("train", recipe, own)[0] == 0
    plugin.write_text("SCALE = 1  # the same\n")
    assert "nothing is left to train" in command("train", recipe, own)[1]
    plugin.write_text("SCALE = 2\n")
    assert "the code of used_plugin.py: was " in command.refuses("train", recipe, own)


def test_checkpoints_without_a_record_are_not_gone_on_with(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    (used.parents[1] / "run.json").unlink()
    said = command.refuses("train", recipe, "train.num_epochs=2")
    assert f"{used} has no run.json beside it, so what made its weights is not known" in said
    assert command("train", recipe, "train.num_epochs=2", ACCEPT)[0] == 0


def test_a_record_of_before_a_key_lacks_it_and_is_the_same_run(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    path = used.parents[1] / "run.json"
    record = json.loads(path.read_text())
    del record["recipe"]["train"]["weight_decay"], record["recipe"]["eval"], record["plugin_code"]
    del record["recipe"]["objective"]["beta"]  # its default is what it was
    path.write_text(json.dumps(record))
    assert "nothing is left to train" in command("train", recipe)[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # r = 1 is the treacherous one: an (1, d) factor would broadcast into (4, d).
        ("peft.r=1", "holds other weights than this recipe trains"),
        ("peft.r=16", "holds other weights than this recipe trains"),
        ("peft.target_modules=[q_proj]", "holds other weights than this recipe trains"),
        ("peft=null", "holds other weights than this recipe trains"),
        ("data.train.0.max_rows=4", "was made with other data"),
        ("train.seed=7", "another data.seed, data.sampling, train.seed or"),
        ("train.shuffle=false", "train.seed or train.shuffle, or another"),
        ("train.global_batch_size=4", "another train.global_batch_size"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_refused_although_changes_are_accepted(
    command: Prefopt, recipe: Path, used: Path, override: str, message: str
) -> None:
    record = (used.parents[1] / "run.json").read_text()
    said = command.refuses("train", recipe, override, "train.num_epochs=2", ACCEPT)
    assert message in said
    assert "another run.output_dir" in said
    assert (used.parents[1] / "run.json").read_text() == record


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "prefopt.json"]
)
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_taken(
    command: Prefopt, recipe: Path, name: str
) -> None:
    """As a bit flips on a disk: the file is as long as it was. The run ends as if nothing had been."""
    run = recipe.parent / "run"
    more = ("train.num_epochs=3", "train.keep_checkpoints=9", "train.save_every=1")
    assert command("train", recipe, *more)[0] == 0
    final = (run / "final" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "final")  # a run that has ended would be left alone
    bad = run / "checkpoints" / "step-3"
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / name).write_bytes(data)
    (run / "checkpoints" / "step-3.bak").mkdir()  # an editor's, or somebody's copy: none of ours
    code, said = command("train", recipe, *more)
    assert code == 0, said
    assert f"the checkpoint {bad} is damaged ({name if name != 'prefopt.json' else bad}" in said
    assert "kept as" in said and "Going on from the one before: step-2" in said
    assert (run / "checkpoints" / "damaged-step-3" / name).read_bytes() == bytes(data)
    assert (run / "final" / "adapter_model.safetensors").read_bytes() == final
    assert f"resumed from {run / 'checkpoints' / 'step-2'} (step 2)" in said


def test_a_damaged_checkpoint_without_another_is_refused_and_kept(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    """Hours of training are started afresh only if somebody asks for it: by the same command again."""
    data = (used / "optimizer.bin").read_bytes()
    (used / "optimizer.bin").write_bytes(data[: len(data) // 2])
    said = command.refuses("train", recipe, "train.num_epochs=2", f"train.resume={used}", code=1)
    assert f"it has {len(data) // 2} bytes instead of {len(data)}" in said
    assert "train.resume = auto takes the newest that is intact" in said
    said = command.refuses("train", recipe, "train.num_epochs=2", code=1)
    assert "there is no other one. It is kept as" in said
    assert (used.parent / "damaged-step-1" / "model.safetensors").is_file()
    assert command("train", recipe)[0] == 0


def test_a_checkpoint_of_an_older_version_is_taken_without_checksums(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    state = json.loads((used / "prefopt.json").read_text())
    older = {key: value for key, value in state.items() if key not in ("seal", "files")}
    (used / "prefopt.json").write_text(json.dumps(older))
    code, said = command("train", recipe, "train.num_epochs=2")
    assert code == 0 and "without checksums: not verified" in said
    (used.parent / "step-2").rename(used.parent / "gone")
    shutil.rmtree(used.parents[1] / "final")
    (used / "model.safetensors").write_bytes(b"")
    said = command.refuses("train", recipe, "train.num_epochs=2", code=1)
    assert f"the checkpoint {used} cannot be loaded: " in said
    assert "delete that directory and run the same command" in said


def test_metrics_that_are_torn_or_edited_are_mended_and_said(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    metrics = used.parents[1] / "metrics.jsonl"
    rows = metrics.read_bytes()
    odd = b'[1]\n{"step": "one"}\n{"step": 1, "a": \n\xff\n'
    metrics.write_bytes(odd + rows + b'{"step": 2, "lo\0\0\0\0')
    code, said = command("train", recipe, "train.num_epochs=2")
    assert code == 0, said
    assert f"{metrics}: its last 19 bytes were cut off by a kill or a power cut" in said
    assert "4 lines are no rows and are left out, line 1 (it holds a list, not an object)" in said
    assert metrics.read_bytes().startswith(rows)
    assert (used.parents[1] / "metrics.jsonl.damaged").read_bytes() == odd + rows
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_the_row_of_the_start_is_there_once_after_a_kill_before_any_checkpoint(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    run = used.parents[1]
    shutil.rmtree(run)
    held_out = "data.eval_frac=0.25"
    assert command("train", recipe, held_out)[0] == 0
    whole = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert whole[0] == 0
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "final")
    assert command("train", recipe, held_out)[0] == 0
    again = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again == whole


def test_a_record_that_is_none_is_named_with_what_to_do(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    run = used.parents[1]
    evaluate = ("eval", run, "--tasks", "kl", "--output", run / "eval")
    for text in ("", '{"recipe": {"mod', "[]", '{"recipe": []}'):
        (run / "run.json").write_text(text)
        for words in (("train", recipe, "train.num_epochs=2"), evaluate):
            said = command.refuses(*words, code=1)
            assert f"{run / 'run.json'}: is not the record of a run as written: it" in said
            assert "Restore it" in said


def test_what_processes_keep_for_themselves_is_gone_on_with_on_as_many(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    (used / "pytorch_model").mkdir()  # as DeepSpeed's shares lie there
    said = command.refuses("train", recipe, "train.num_epochs=2")
    assert f"{used} was written by 1 process of DeepSpeed, this launch has 1 process: " in said
    assert "Start it as it was started" in said


def test_branching_off_into_a_directory_with_other_checkpoints_is_refused(
    command: Prefopt, recipe: Path, used: Path, tmp_path: Path
) -> None:
    """Two histories under one name: `auto` would go on from the wrong one, pruning would keep it."""
    more = ("train.num_epochs=3", "train.keep_checkpoints=9", "train.save_every=1")
    assert command("train", recipe, *more)[0] == 0
    said = command.refuses("train", recipe, *more, f"train.resume={used}")
    assert "holds other checkpoints, up to step-3" in said
    assert "Use train.resume = auto" in said and "another run.output_dir" in said
    code, said = command(
        "train", recipe, *more, f"train.resume={used}", f"run.output_dir={tmp_path / 'branch'}"
    )
    assert code == 0 and f"resumed from {used} (step 1)" in said
    half = tmp_path / "half"
    half.mkdir()
    said = command.refuses("train", recipe, f"train.resume={half}")
    assert "not a complete checkpoint (no prefopt.json)" in said
