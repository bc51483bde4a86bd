"""`prefopt show RUN --rollouts`: what is on the page is what is in the log, and a run without one says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.commands.show_rollouts import MOST_CHARS, find_batch, summary
from prefopt.engines.base import Completion
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.rollouts.experience import DIRECTORY, ExperienceLog
from prefopt.rollouts.plan import Start
from tests.unit.test_show import byte_tokenizer

LONG = "x" * (MOST_CHARS + 50)


def group(place: int, *, prompt: str = "Hi?") -> RolloutGroup:
    """Right, wrong and cut; the pair is (0, 1)."""
    tokenizer = byte_tokenizer()
    return RolloutGroup(
        start=Start(place, place, (), (1, 2, 3)),
        prompt_id=f"rows.jsonl:{place}",
        prompt_ids=tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
        completions=(
            Completion((5, 6, 1), (-1.0, -1.0, -1.0), "eos"),
            Completion((7, 1), (-1.0, -1.0), "eos"),
            Completion((8, 9, 8, 9), (-1.0,) * 4, "length"),
        ),
        texts=("the right answer", "a wrong one", LONG),
        rewards=(1.5, 0.0, 0.75),
        parts={"math": (1.0, 0.0, 1.0), "length_penalty": (0.5, 0.0, -0.25)},
        pairs=((0, 1),),
    )


def skipped(place: int, reason: str) -> RolloutGroup:
    return replace(group(place), pairs=(), skipped=reason)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two processes, steps 1 and 2; the second was sampled by the weights of step 0."""
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    record = {"recipe": {"model": {"path": str(tmp_path / "model")}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    first = [group(0), skipped(2, "tie")], [skipped(1, "all_right"), group(3)]
    failed = replace(group(1), pairs=(), rewards=None, failed="judge: not finite")
    second = [replace(group(0), pairs=(), advantages=(0.75, -0.75, 0.0))], [failed]
    for rank in (0, 1):
        log = ExperienceLog(tmp_path / DIRECTORY / f"rank-{rank:05d}", "now")
        seconds = {"generate_s": 2.0 + rank, "score_s": 0.5}
        log.append(RolloutBatch(0, 0, tuple(first[rank]), seconds))
        log.append(RolloutBatch(1, 0, tuple(second[rank]), seconds))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["show", *map(str, arguments), "--rollouts", "--no-color"]) == 0
    output = capsys.readouterr().out
    assert "\x1b[" not in output
    return output


def test_responses_stand_side_by_side_with_their_scores_and_labels(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    output = shown(capsys, run, "--step", 1, "-n", 1)
    assert "── rows.jsonl:0 ── step 1 · version 0 · trained on" in output
    assert "prompt (3 tokens)\nHi?\n" in output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    table = [cells for cells in lines if len(cells) == 3]
    assert table[0] == ["#0 chosen", "#1 rejected", "#2"]
    assert table[1] == ["reward 1.5", "reward 0", "reward 0.75"]
    assert table[2][:2] == ["math 1, length_penalty 0.5", "math 0, length_penalty 0"]
    assert table[3] == ["3 tokens, ended", "2 tokens, ended", "4 tokens, cut at the limit"]
    assert table[4][:2] == ["the right answer", "a wrong one"]
    assert "… 50 more characters …" in output


def test_a_narrow_terminal_puts_the_pair_first_and_leaves_no_response_out(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = shown(capsys, run, "--step", 1, "-n", 1)
    pair = next(line for line in output.splitlines() if "#0 chosen" in line)
    assert "#1 rejected" in pair and "#2" not in pair
    assert output.count("x" * 20) > 1


def test_the_newest_step_is_shown_with_advantages_and_what_failed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    output = shown(capsys, run)
    assert "advantage +0.75" in output and "advantage -0.75" in output
    assert (
        "── rows.jsonl:1 ── step 2 · version 0 · dropped, a signal failed: judge: not finite"
        in output
    )
    assert "step 2: 2 prompts, 6 responses · version 0, lag 1 · mean reward 0.75" in output
    assert "trained on 50% of the groups · 1 failed · truncated 33%" in output


def test_the_summary_puts_the_processes_together(run: Path) -> None:
    """Groups in the order of one process; mean of (1.5 + 0 + 0.75)/3; the slowest process's seconds."""
    batch = find_batch(run, 1)
    assert [g.start.place for g in batch.groups] == [0, 1, 2, 3]
    assert summary(batch) == (
        "step 1: 4 prompts, 12 responses · version 0, lag 0 · mean reward 0.75 · trained on 50% of the "
        "groups · 1 all_right · 1 tie · truncated 33% · generate 3.00 s, score 0.50 s"
    )


def test_a_step_sampled_again_under_other_settings_is_shown_as_it_was_last(run: Path) -> None:
    """The second life has one process; what the other one left is of another lineage."""
    log = ExperienceLog(run / DIRECTORY / "rank-00000", "other settings")
    log.append(RolloutBatch(0, 0, (group(0, prompt="Again?"),), {}))
    batch = find_batch(run, 1)
    assert [len(g.prompt_ids) for g in batch.groups] == [len("Again?")]
    assert find_batch(run, None).step == 0
    assert len(find_batch(run, 2).groups) == 2


def test_rollouts_are_shown_without_the_tokenizer_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").unlink()
    output = shown(capsys, run, "--step", 1, "-n", 1)
    assert "prompt (3 tokens)\n" in output and "Hi?" not in output
    assert "the right answer" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["RUN"],
            "--rollouts. A value head: prefopt show OUTPUT_DIR/value/head. The examples of a",
        ),
        (["RUN", "--rollouts", "--step", "7"], "has rollouts of steps 1 to 2"),
        (["RUN/model", "--rollouts"], "has no rollouts/: give the run.output_dir of a run with"),
        (["RUN/nowhere", "--rollouts"], "no such directory: give the run.output_dir"),
        (["RUN", "--rollouts", "train.seed=3"], "train.seed=3: would be ignored"),
        (["RUN", "--step", "2"], "add --rollouts"),
    ],
)
def test_what_cannot_be_shown_says_what_can(
    run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *(a.replace("RUN", str(run)) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_log_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = run / DIRECTORY / "rank-00000" / "shard-00000.jsonl"
    shard.write_text("no json\n" + shard.read_text())
    assert main(["show", str(run), "--rollouts"]) == 1
    assert f"{shard}:1: it is cut or edited" in capsys.readouterr().err
