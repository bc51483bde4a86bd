"""A recipe's plugins are a program: `check` says that it runs them, and `--no-plugins` does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prefopt.cli import main
from tests.distributed.launch import write_model, write_recipe

PLUGIN = """
from pathlib import Path
from prefopt.recipe.registry import signal
from prefopt.signals.base import per_response
Path(__file__).with_suffix(".ran").write_text("ran")
@signal("{name}", source="tests")
def made_up():
    return per_response(lambda prompt, text: 1.0)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plugins") / "model")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    """Of rollouts, with a plugin that leaves a mark; `stranger_signal` is a name of its own in each test."""
    name = f"stranger_{abs(hash(tmp_path))}"
    (tmp_path / "stranger.py").write_text(PLUGIN.format(name=name))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    path = write_recipe(tmp_path / "r.yaml", model, rows, regime={"name": "rollouts"})
    raw = {**yaml.safe_load(path.read_text()), "signals": [{"name": name}]}
    path.write_text(yaml.safe_dump({**raw, "plugins": ["stranger.py"]}))
    return path


def ran(recipe: Path) -> bool:
    return (recipe.parent / "stranger.ran").exists()


def test_check_says_that_it_runs_plugins(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe)]) == 0
    assert ran(recipe)
    assert (
        "runs the code of stranger.py; for a file of somebody else: --no-plugins"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("command", ["check", "show"])
def test_without_plugins_none_is_run_and_their_names_are_unknown_because_of_that(
    command: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(recipe), "--no-plugins"]) == 2
    assert not ran(recipe)
    said = capsys.readouterr()
    assert "may be one of stranger.py, which was not run because of --no-plugins" in said.err
    assert "runs the code" not in said.out
    assert main(["check", str(recipe)]) == 0  # the option was for that command alone
    assert ran(recipe)


def test_a_recipe_that_needs_no_name_of_its_plugins_is_checked_and_shown(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = "signals=[{name: regex, pattern: a}]"
    assert main(["check", str(recipe), "--no-plugins", plain]) == 0
    assert main(["show", str(recipe), "--no-plugins", plain, "-n", "1"]) == 0
    assert not ran(recipe)
    assert main(["check", str(recipe), "--no-plugins", plain, "plugins.0=other.py"]) == 2
    assert "no such Python file" in capsys.readouterr().err


def test_a_pipelines_plugins_are_left_out_too(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        {"stage": "prompts", "sources": [{"path": str(recipe.parent / "rows.jsonl")}]},
        {"stage": "made_up_by_a_stranger"},
    ]
    pipeline = recipe.parent / "p.yaml"
    pipeline.write_text(
        json.dumps({"output_dir": "o", "plugins": ["stranger.py"], "stages": stages})
    )
    assert main(["data", "check", str(pipeline), "--no-plugins"]) == 2
    assert not ran(recipe)
    assert "because of --no-plugins" in capsys.readouterr().err
    assert main(["data", "check", str(pipeline)]) == 2
    assert ran(recipe) and "runs the code of stranger.py" in capsys.readouterr().out
