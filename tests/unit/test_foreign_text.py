"""Sampled text, cells, tokens and names of files reach the terminal of a command as text, whoever wrote them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.engines.base import Completion
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.rollouts.experience import DIRECTORY, ExperienceLog
from prefopt.rollouts.plan import Start
from tests.distributed.launch import write_model, write_recipe
from tests.eval.runs import write_jsonl

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj.exe [red]x[/red] [link=http://x]y[/link] :smile:"
ACTS = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def is_harmless(said: str) -> bool:
    rest = COLOURS.sub("", said)
    return not ACTS.search(rest) and "\x1b" not in rest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("foreign") / "model")


def test_cells_tokens_and_ids_are_shown_as_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "prompt": f"ask {EVIL}",
        "chosen": f"yes {EVIL}",
        "rejected": "no",
        "id": EVIL,
        "answer": EVIL,
    }
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    recipe = write_recipe(tmp_path / "r.yaml", model, rows)
    source = f"data.train=[{{path: {rows}, format: text, columns: {{id: id}}}}]"
    assert main(["show", str(recipe), source]) == 0
    said = capsys.readouterr().out
    assert is_harmless(said) and "\\u001b]0;owned" in said
    assert "[red]x[/red]" in said.replace("│", "")
    prompts = [source.replace("train", "prompts"), "regime.name=rollouts"]
    signals = "signals=[{name: exact_match}]"
    assert main(["show", str(recipe), *prompts, signals]) == 0
    said = capsys.readouterr().out
    assert is_harmless(said) and "answer: \\u001b]0;owned" in said


def test_names_of_files_in_errors_and_log_lines_are_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[2J[red]b"
    folder.mkdir()
    recipe = write_recipe(
        folder / "r.yaml", model, write_jsonl(folder / "rows.jsonl", [{"prompt": EVIL}])
    )
    assert main(["check", str(recipe)]) == 2
    said = capsys.readouterr()
    assert is_harmless(said.err) and "a\\u001b[2J[red]b" in said.err
    assert main(["check", str(recipe), f"objective.name={EVIL}"]) == 2
    assert is_harmless(capsys.readouterr().err)


def test_what_a_run_sampled_is_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = RolloutGroup(
        start=Start(0, 0, (), (1, 2)),
        prompt_id=EVIL,
        prompt_ids=(1, 2),
        completions=(Completion((3,), (-1.0,), "eos"), Completion((4,), (-1.0,), "eos")),
        texts=(EVIL, f"two\r{EVIL}"),
        rewards=(1.0, 0.0),
        parts={f"judge{EVIL}": (1.0, 0.0)},
        skipped=None,
        failed=f"judge: {EVIL}",
    )
    log = ExperienceLog(tmp_path / "run" / DIRECTORY / "rank-00000", "lineage")
    log.append(RolloutBatch(0, 0, (group,), {}))
    assert main(["show", str(tmp_path / "run"), "--rollouts"]) == 0
    said = capsys.readouterr().out
    assert is_harmless(said)
    assert "two\\u000d" in said  # rich alone would leave the carriage return out
    assert "[red]x" in said


def test_a_card_and_a_table_of_scores_show_names_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{n} {EVIL}", "chosen": f"{EVIL} a{n}", "rejected": f"b{n}"} for n in range(30)
    ]
    write_jsonl(tmp_path / "x\x1b[2J[red]y.jsonl", rows)
    assert main(["data", "card", "x\x1b[2J[red]y.jsonl", "--output", "card"]) in (0, 1)
    said = capsys.readouterr()
    assert is_harmless(said.out) and is_harmless(said.err)
    answers = [{"question": "q", "answer": "#### 1", "response": f"#### 1 {EVIL}"}]
    write_jsonl(tmp_path / "s\x1b[2J[red]t.jsonl", answers)
    assert main(["eval", "score", "gsm8k", "s\x1b[2J[red]t.jsonl"]) == 0
    said = capsys.readouterr()
    assert is_harmless(said.out) and "[red]t" in said.out.replace("\n", "")
    assert main(["eval", "score", "gsm8k", "s\x1b[2J[red]t.jsonl", "--json"]) == 0
    found = capsys.readouterr().out
    assert is_harmless(found) and json.loads(found)
