"""Starting into a run directory that holds checkpoints: gone on with, or refused and left as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prefopt.storage.reading import sealed
from tests.recipes.commands import Prefopt


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
def test_checkpoint_of_another_recipe_is_refused_and_the_record_of_the_run_kept(
    command: Prefopt, recipe: Path, used: Path, override: str, message: str
) -> None:
    record = (used.parents[1] / "run.json").read_text()
    said = command.refuses("train", recipe, override, "train.num_epochs=2")
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


def test_checkpoint_of_another_number_of_processes_is_refused(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    state = json.loads((used / "prefopt.json").read_text())
    del state["seal"]
    (used / "prefopt.json").write_text(json.dumps(sealed({**state, "num_processes": 4})))
    said = command.refuses("train", recipe, "train.num_epochs=2")
    assert f"{used} was written by 4 processes, this run has 1; start it with as many" in said


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
