"""The quickstart from prompts at toy size: its pipeline with the embedded engine, its pairs fit for its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.recipe.checks import check
from recipes.quickstart import from_prompts, run
from recipes.quickstart.task import make_splits, score_group
from tests.recipes.test_quickstart_online import half_right_policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with prompts, a policy that is sometimes right, and what the pipeline made of them."""
    directory = tmp_path_factory.mktemp("prompts")
    splits = make_splits(num_sft=0, num_preference=16, num_held_out=4, seed=0)
    model, tokenizer = half_right_policy(splits.preference)
    final = directory / run.RUN_DIR / "sft" / "final"
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    (final.parent / "run.json").write_text('{"recipe": {"model": {"path": "base"}}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        from_prompts.write_prompts(splits)
        overrides = ["stages.sample.engine={name: hf}", "shard_rows=5"]
        assert main(["data", "build", str(ROOT / from_prompts.PIPELINE), *overrides]) == 0
    return directory / from_prompts.RUN_DIR / "data"


def pairs(directory: Path) -> list[dict]:
    files = sorted((directory / from_prompts.LAST_STAGE).iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_verifier_decides_which_side_is_chosen(directory: Path) -> None:
    found = pairs(directory)
    assert len(found) > 4
    for pair in found:
        scores = score_group(pair["prompt"], [pair["chosen"], pair["rejected"]])
        assert scores == [1.0, 0.0] == [pair["score_chosen"], pair["score_rejected"]]
        assert pair["info_chosen"]["model"] == "sft"


def test_every_prompt_is_a_pair_or_counted(directory: Path) -> None:
    stages = json.loads((directory / "manifest.json").read_text())["stages"]
    assert [stage["id"] for stage in stages] == ["prompts", "sample", "score", "pair", "filter"]
    dropped = [sum(stage["counts"]["dropped"].values()) for stage in stages]
    assert stages[0]["counts"]["rows_in"] == 16 == sum(dropped) + len(pairs(directory))


def test_the_recipe_takes_the_folder_as_it_is(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prefopt check` of the very settings the quickstart trains with reads the rows, too."""
    monkeypatch.chdir(directory.parents[2])
    overrides = [each for each in from_prompts.training_overrides() if "eval_frac" not in each]
    check(ROOT / "recipes" / "quickstart" / "simpo.yaml", [*overrides, "train.global_batch_size=4"])
