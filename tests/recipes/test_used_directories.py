"""Starting into a run directory that holds checkpoints: gone on with, or refused and left as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_damaged_checkpoint_is_named_with_the_way_out(
    command: Prefopt, recipe: Path, used: Path, name: str
) -> None:
    data = (used / name).read_bytes()
    (used / name).write_bytes(data[: len(data) // 2])
    said = command.refuses("train", recipe, "train.num_epochs=2", code=1)
    assert f"the checkpoint {used} cannot be loaded: " in said
    assert "delete that directory and run the same command" in said
    shutil.rmtree(used)
    assert command("train", recipe)[0] == 0


def test_checkpoint_of_another_number_of_processes_is_refused(
    command: Prefopt, recipe: Path, used: Path
) -> None:
    state = json.loads((used / "prefopt.json").read_text())
    (used / "prefopt.json").write_text(json.dumps({**state, "num_processes": 4}))
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
