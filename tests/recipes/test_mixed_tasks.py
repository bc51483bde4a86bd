"""Math, code and chat side by side, online, on the quickstart's policy: each row is scored by its own signal only.

What a signal must say of a text is worked out here, by other means than the signal's own code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.rollouts.experience import read_log
from prefopt.training.metrics import read_metrics
from prefopt.wiring import train
from recipes.quickstart.task import make_splits
from tests.recipes.test_quickstart_online import half_right_policy
from tests.signals.chat_server import Answer, ChatServer, chat_server

PROBLEMS = make_splits(num_sft=0, num_preference=16, num_held_out=0, seed=0).preference


def likes_zeros(body: dict[str, Any]) -> Answer:
    """A rating of 9 for an answer with a zero in it, else 2."""
    said = body["messages"][0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
    return Answer("Rating: [[9]]" if "0" in said else "Rating: [[2]]")


@pytest.fixture(scope="module")
def judge() -> Iterator[ChatServer]:
    with chat_server(likes_zeros) as server:
        yield server


def rows_of(directory: Path) -> None:
    """A file a task, each with the columns of its own task alone."""
    files = {
        "sums": [{"prompt": p.prompt, "answer": p.answer} for p in PROBLEMS[:6]],
        "programs": [
            {"prompt": p.prompt, "tests": "assert len('ab') == 2"} for p in PROBLEMS[6:10]
        ],
        "talk": [{"prompt": p.prompt, "answer": None} for p in PROBLEMS[10:14]],
        "poems": [{"prompt": p.prompt} for p in PROBLEMS[14:]],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, judge: ChatServer) -> Path:
    directory = tmp_path_factory.mktemp("mixed")
    model, tokenizer = half_right_policy(PROBLEMS)
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    rows_of(directory)
    recipe = {
        "model": {"path": "policy"},
        "peft": {"type": "lora", "r": 4},
        "data": {
            "prompts": [
                {"path": "sums.jsonl", "format": "text"},
                {"path": "programs.jsonl", "format": "text"},
                {"path": "talk.jsonl", "format": "text", "name": "chat"},
                {"path": "poems.jsonl", "format": "text"},
            ],
            "cache_dir": "cache",
        },
        "objective": {"name": "grpo"},
        "regime": {"name": "rollouts", "samples_per_prompt": 4, "max_new_tokens": 10},
        "signals": [
            {"name": "exact_match", "only_where": "answer"},
            {"name": "python_tests", "only_where": "tests", "weight": 2.0},
            {
                "name": "judge",
                "only_where": {"source": "chat"},
                "mode": "pointwise",
                "base_url": judge.base_url,
                "model": "m",
                "cache_dir": "judgments",
            },
            {"name": "length_penalty", "per_token": 0.25, "free_tokens": 8},
        ],
        "train": {"learning_rate": 1e-3, "global_batch_size": 7, "log_every": 1, "num_epochs": 1},
        "run": {"output_dir": "run"},
    }
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return directory


@pytest.fixture(scope="module")
def trained(directory: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return directory / train("recipe.yaml")


def compiles(text: str) -> bool:
    """Digits alone are a program unless they begin with a zero and have other digits: then a SyntaxError."""
    return not text or text.strip("0") == "" or (text.isdecimal() and text[0] != "0")


def test_each_row_is_scored_by_its_own_signal_only(trained: Path, judge: ChatServer) -> None:
    answers = {problem.prompt: problem.answer for problem in PROBLEMS}
    prompts = [p.prompt for p in PROBLEMS[:14]]
    own = ["exact_match"] * 6 + ["python_tests"] * 4 + ["judge"] * 4
    seen: dict[str, int] = {}
    for _, groups in read_log(trained):
        for group in groups:
            name = own[group["row"]]
            texts = [response["text"] for response in group["responses"]]
            assert set(group["parts"]) == {name, "length_penalty"}, "None, and not NaN"
            right = {
                "exact_match": [float(t == answers[prompts[group["row"]]]) for t in texts],
                "python_tests": [float(compiles(t)) for t in texts],
                "judge": [9.0 if "0" in t else 2.0 for t in texts],
            }[name]
            assert group["parts"][name] == right
            weight = 2.0 if name == "python_tests" else 1.0
            short = group["parts"]["length_penalty"]
            expected = [weight * r + s for r, s in zip(right, short, strict=True)]
            assert group["rewards"] == pytest.approx(expected)
            seen[name] = seen.get(name, 0) + 1
    assert seen == {"exact_match": 6, "python_tests": 4, "judge": 4}
    asked = [re.findall(r"\d{8}:", body["messages"][0]["content"]) for body in judge.requests]
    assert {each[0] for each in asked} == set(prompts[10:14])


def test_metrics_of_a_part_are_over_the_rows_that_it_is_for(trained: Path) -> None:
    parts: dict[int, dict[str, list[float]]] = {}
    for commit, groups in read_log(trained):
        of_step = parts.setdefault(commit["commit"] + 1, {})
        for group in groups:
            for name, values in group["parts"].items():
                of_step.setdefault(name, []).extend(values)
    for row in read_metrics(trained / "metrics.jsonl"):
        for name, values in parts[row["step"]].items():
            assert row[f"reward/{name}"] == pytest.approx(sum(values) / len(values))
        assert row["rollout/failed_frac"] == 0


def test_rows_that_no_signal_is_for_are_counted_and_cost_nothing(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["data"]["rejects"] == {"no_signal": 2}
    assert all(group["row"] < 14 for _, groups in read_log(trained) for group in groups)


def test_check_says_early_which_rows_and_which_signals_are_left_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    assert main(["check", "recipe.yaml"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data.prompts.3: no signal is for 2 of its first 2 rows" in said
    assert "signals.2" not in said
    changed = ["signals.2.only_where.source=caht", "run.output_dir=other"]
    assert main(["check", "recipe.yaml", *changed]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data.prompts.2: no signal is for 4 of its first 4 rows" in said
    assert (
        "signals.2.only_where (judge): holds for none of the first rows of sums, programs" in said
    )


def test_a_row_without_the_column_of_its_own_signal_is_still_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    named = "signals.1.only_where={source: [programs, poems]}"
    assert main(["check", "recipe.yaml", named, "run.output_dir=other"]) != 0
    assert "no column 'tests'" in capsys.readouterr().err


def test_prompts_and_rollouts_are_shown_with_what_scores_them(
    directory: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(directory)
    assert main(["show", "recipe.yaml", "-n", "8"]) == 0
    said = capsys.readouterr().out
    assert said.count("answer: ") == 6 and said.count("tests: assert len") == 2
    assert "no_signal" in said
    assert main(["show", "run", "--rollouts", "-n", "7"]) == 0
    assert "judge" in capsys.readouterr().out
