"""docs/where_is.md, held to its word: one of each kind is added to a copy, where the page says, and works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.newcomer import ADDITIONS, EXERCISE

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "where_is.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| to ")
]
TOUCHED = {row[0]: set(re.findall(r"`([^`]+)`", row[1])) for row in ROWS if len(row) == 3}

# By hand: gamma - (-2 + 3); a word that only one text has; 3 times (7, 8); the weights before and after a step.
WORKS: dict[str, Any] = {
    "objective": [2.0],
    "signal": [0.0, 1.0],
    "credit rule": [[1, 0]],
    "stage": "more?!",
    "benchmark": 100.0,
    "engine": [7, 8, 7, 8, 7, 8],
    "reference": [True, True],
    "attention kernel": [True, 1],
    "schedule step": True,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every addition, all made to one copy of the packages."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("prefopt", "data_pipelines", "eval"):
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for addition in ADDITIONS.values():
        addition.make(copy)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    run = subprocess.run(
        [sys.executable, "-c", EXERCISE], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_page_names_what_is_touched_and_nothing_else() -> None:
    assert {kind: each.touched for kind, each in ADDITIONS.items()} == TOUCHED


def test_every_path_on_the_page_exists() -> None:
    for path in set(re.findall(r"`((?:prefopt|eval|data_pipelines|tests)/[\w/.]*)`", PAGE)):
        assert (ROOT / path.replace("NAME.py", "")).exists(), path


@pytest.mark.parametrize("kind", ADDITIONS)
def test_one_more_works(kind: str, found: dict[str, Any]) -> None:
    assert found[kind] == WORKS[kind]
