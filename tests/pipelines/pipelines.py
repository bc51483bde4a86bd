"""Pipelines for tests: YAML written in place, run through the command, their folders read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.cli import main

PLUGIN = str(Path(__file__).with_name("made_up.py"))


def write_pipeline(path: Path, stages: list[dict[str, Any]], **settings: Any) -> Path:
    """A pipeline file beside its output (``<name>-out``); the made-up stages are there to be used."""
    raw = {"output_dir": str(path.with_suffix("")) + "-out", "plugins": [PLUGIN], **settings}
    path.write_text(yaml.safe_dump({**raw, "stages": stages}, sort_keys=False))
    return path


def output(path: Path) -> Path:
    """The output folder of a pipeline of `write_pipeline`."""
    return Path(str(path.with_suffix("")) + "-out")


def build(path: Path, *arguments: str) -> Path:
    """Runs a pipeline that must succeed; returns its output folder."""
    assert main(["data", "build", str(path), *arguments]) == 0
    return output(path)


def refused(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str, code: int = 2) -> str:
    """What a pipeline that must fail says; a traceback would have escaped."""
    capsys.readouterr()
    assert main(["data", "build", str(path), *arguments]) == code
    return " ".join(capsys.readouterr().err.split())


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a stage's folder, in order."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    return found


def made(folder: Path) -> dict[str, bytes]:
    """Every file that a finished pipeline leaves, by its path: what two equal runs must share."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "leases" not in path.parts
    }


def counts(folder: Path, stage: str) -> dict[str, Any]:
    """Rows in, out and dropped of a finished stage."""
    return json.loads((folder / "manifest" / stage / "done.json").read_text())["counts"]
