"""What the tests of whole commands share: a tiny model, pairs and recipe on disk, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import write_model, write_pairs, write_recipe
from tests.recipes.commands import Prefopt


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Prefopt:
    return Prefopt(capfd)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    write_pairs(directory / "pairs.jsonl", 8)
    return directory


@pytest.fixture
def recipe(tmp_path: Path, inputs: Path) -> Path:
    """One step over 8 pairs, at a rate that more steps do not change."""
    train = {"num_epochs": 1, "lr_scheduler": "constant", "warmup_frac": 0.0}
    return write_recipe(
        tmp_path / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl", train=train
    )
