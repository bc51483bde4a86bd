"""Win rate on prompts of one's own: verdicts in both orders, by hand and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Example, Judgment, Row
from eval.registry import make_task
from eval.score import score_file
from prefopt.cli import main
from prefopt.errors import ConfigError, DataError
from prefopt.signals.judge import PAIRWISE_TEMPLATE
from tests.eval.runs import read_jsonl, write_chat_model, write_jsonl
from tests.signals.chat_server import Answer as Reply
from tests.signals.chat_server import chat_server

EXAMPLE = Example("k", ({"role": "user", "content": "Why?"},))


def judged(first: str | None, swapped: str | None, ours: str = "mine", **judgment: Any) -> Row:
    """The row of one prompt from the judge's letters: with the model's answer first, then second."""
    task = make_task("win_rate")
    questions = task.questions(EXAMPLE, [(Answer(ours),)], [(Answer("theirs"),)])
    texts = [f"Well. [[{letter}]]" if letter else "Hm." for letter in (first, swapped)]
    judgments = {
        question.id: Judgment(text, **judgment)
        for question, text in zip(questions, texts, strict=True)
    }
    return task.row(EXAMPLE, [(Answer(ours),)], judgments)


def summarise(rows: Sequence[Row]) -> Any:
    return make_task("win_rate").summarise(rows)


def examples(tmp_path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return make_task("win_rate", {"data": str(data)}).examples()


@pytest.mark.parametrize(
    ("first", "swapped", "points"),
    [
        ("A", "B", 1.0),
        ("B", "A", 0.0),
        ("C", "C", 0.5),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("A", "C", 0.5),
        ("A", None, None),
        (None, None, None),
    ],
)
def test_a_win_takes_both_orders_and_disagreement_is_a_tie(
    first: str | None, swapped: str | None, points: float | None
) -> None:
    row = judged(first, swapped)
    assert row.values == {"win_rate": points}
    assert row.problem == (None if points is not None else "no_verdict")


def test_both_orders_are_shown_to_the_judge_with_the_prompt() -> None:
    task = make_task("win_rate")
    questions = task.questions(EXAMPLE, [(Answer("{prompt}"),)], [(Answer("theirs"),)])
    texts = [question.messages[0]["content"] for question in questions]
    expected = [("{prompt}", "theirs"), ("theirs", "{prompt}")]
    for text, (a, b) in zip(texts, expected, strict=True):
        assert f"<answer_a>\n{a}\n</answer_a>\n\n<answer_b>\n{b}\n</answer_b>" in text
        assert "<request>\nWhy?\n</request>" in text
    assert task.template.origin == "prefopt" and task.template.texts["prompt"] == PAIRWISE_TEMPLATE


def test_equal_answers_tie_unasked() -> None:
    task = make_task("win_rate")
    same = [(Answer("same"),)]
    assert task.questions(EXAMPLE, same, same) == []
    row = task.row(EXAMPLE, same, {})
    assert row.values == {"win_rate": 0.5} and row.problem is None
    summary = summarise([row])
    assert summary.counts["n_equal"] == summary.counts["n_ties"] == 1


def test_numbers_by_hand() -> None:
    """Points 1, 0, 0.5, 0.5 and one prompt without a verdict: 2 of 4.

    Of five pairs asked, three are judged alike (a win, a loss, a tie); of nine verdicts four are for the answer
    shown first (A B, B A, C C, A A: A four times) and two for the second, and one more A stands alone: 5 - 2 of 9.
    Longer by characters ("mine and more" against "theirs") is the model's in the first two, shorter in the rest.
    """
    rows = [
        judged("A", "B", "mine and more"),
        judged("B", "A", "mine and more"),
        judged("C", "C"),
        judged("A", "A"),
        judged("A", None),
    ]
    summary = summarise(rows)
    value = {name: metric.value for name, metric in summary.metrics.items()}
    assert value["win_rate"] == 50.0
    assert summary.metrics["win_rate"].stderr == pytest.approx(100 * (0.5 / 3 / 4) ** 0.5)
    assert value["consistency"] == pytest.approx(60.0)
    assert value["position_bias"] == pytest.approx(100 * (5 - 2) / 9)
    assert value["win_rate_longer"] == 50.0 and value["win_rate_shorter"] == 50.0
    assert value["longer_share"] == pytest.approx(40.0)
    assert value["avg_length"] == pytest.approx((2 * 13 + 3 * 4) / 5)
    assert value["baseline_avg_length"] == 6.0
    assert summary.counts == {
        "n": 5, "n_wins": 1, "n_ties": 2, "n_losses": 1, "n_equal": 0, "n_verdicts_missing": 1,
        "num_no_verdict": 1,
    }  # fmt: skip


def test_refusals_and_answers_that_are_not_there_are_counted_by_name() -> None:
    assert judged(None, None, refused="HTTP 400").problem == "judge_refused"
    task = make_task("win_rate")
    ours, theirs = Answer("", problem="prompt_too_long"), Answer("", problem="template_refused")
    for left, right, problem in (
        (ours, Answer("b"), "prompt_too_long"),
        (Answer("a"), theirs, "baseline_template_refused"),
        (ours, theirs, "prompt_too_long"),
    ):
        task.questions(EXAMPLE, [(left,)], [(right,)])
        assert task.row(EXAMPLE, [(left,)], {}).problem == problem


def test_a_judge_that_never_gives_a_verdict_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no verdict on any of the 2 prompts.*\[\[A\]\]"):
        summarise([judged(None, None), judged("A", None)])


def test_prompts_are_texts_or_messages_and_keys_their_own_or_the_texts(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    found = examples(
        tmp_path,
        [
            {"prompt": "Hi", "key": "one"},
            {"instruction": "Hello"},
            {"messages": turns},
            {"prompt": turns[:1]},
        ],
    )
    assert found[0].key == "one" and len({each.key for each in found}) == 4
    assert found[1].prompt == ({"role": "user", "content": "Hello"},)
    assert found[2].prompt == tuple(turns) and found[3].prompt == (turns[0],)
    again = examples(tmp_path, [{"messages": turns}, {"instruction": "Hello"}])
    assert [each.key for each in again] == [found[2].key, found[1].key]


def test_a_dialogue_is_shown_with_its_roles() -> None:
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    )
    task = make_task("win_rate")
    question, _ = task.questions(Example("k", turns), [(Answer("a"),)], [(Answer("b"),)])
    assert "[user]\nHi\n\n[assistant]\nYes?\n\n[user]\nGo" in question.messages[0]["content"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": "a"}], r"jsonl:2: a second prompt .*jsonl:1"),
        ([{"prompt": "a", "key": 7}, {"prompt": "b", "key": "7"}], r"a second prompt with key '7'"),
        (
            [{"question": "a"}],
            r"jsonl:1: column 'prompt' or 'instruction' or 'messages' is missing",
        ),
        ([{"prompt": [{"role": "user"}]}], r"jsonl:1: a prompt must be a text, or messages"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], r"end with the role 'assistant'"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused_naming_the_line(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        examples(tmp_path, rows)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.win_rate\.data is missing"):
        make_task("win_rate").examples()
    path = tmp_path / "template.txt"
    path.write_text("{prompt} {response_a}")
    with pytest.raises(ConfigError, match=r"template = .*needs \{response_b\}"):
        make_task("win_rate", {"template": str(path)})
    with pytest.raises(ConfigError, match="reads no published files"):
        score_file("win_rate", path, {})


def test_an_evaluation_runs_whole_and_asks_again_where_there_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge goes for the baseline's answer; of prompt 0 it needs a reminder, of prompt 1 it says nothing."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Prompt {n}"} for n in range(4)])
    answers = [{"prompt": f"Prompt {n}", "answer": f"baseline {n}"} for n in (3, 1, 0, 2)]
    baseline = write_jsonl(tmp_path / "baseline.jsonl", answers)
    model = write_chat_model(tmp_path / "model")

    def answer(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if "Prompt 1\n" in text or ("Prompt 0\n" in text and len(body["messages"]) == 1):
            return Reply("Both have their points.")
        return Reply("[[A]]" if "<answer_a>\nbaseline" in text else "[[B]]")

    settings = [
        "judge.model=judge",
        f"tasks.win_rate.data={data}",
        "tasks.win_rate.max_new_tokens=8",
        "tasks.win_rate.max_asks=2",
    ]
    run = ["eval", str(model), "--tasks", "win_rate", "--output", str(tmp_path / "out"), *settings]
    with chat_server(answer) as server:
        url = f"judge.base_url={server.base_url}"
        assert main([*run, url]) == 2
        assert "--baseline is missing" in capsys.readouterr().err
        assert main([*run, url, f"baseline_answers={baseline}"]) == 0
        assert len(server.requests) == 4 * 2 + 4
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["win_rate"]
    assert entry["metrics"]["win_rate"]["value"] == 0.0
    assert entry["metrics"]["consistency"]["value"] == 100.0
    assert entry["counts"]["n_losses"] == 3 and entry["counts"]["num_no_verdict"] == 1
    rows = read_jsonl(tmp_path / "out" / "win_rate" / "examples.jsonl")
    assert [row["values"]["win_rate"] for row in rows] == [0.0, None, 0.0, 0.0]
    assert [row["details"]["verdicts"] for row in rows][1:3] == [[None, None], ["B", "A"]]
