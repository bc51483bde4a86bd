"""LLMBar: the published accuracies and agreement of 18 judges, and a model asked in both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Row, Summary
from eval.registry import make_task
from prefopt.errors import ConfigError, DataError
from tests.eval.runs import write_jsonl

PAIRS = [
    {"input": "Say hi {output_2}.", "output_1": "hi", "output_2": "bye", "label": 1},
    {"input": "Count to two.", "output_1": "1", "output_2": "1 2", "label": 2},
]


def _judged(number: int, label: int, first: Any, swapped: Any, **more: Any) -> dict[str, Any]:
    return {"i": number, "label": label, "completion": first, "completion_swapped": swapped, **more}


def _summary(path: Path, rows: list[dict[str, Any]]) -> Summary:
    task = make_task("llmbar", {})
    return task.summarise(task.read(write_jsonl(path / "judged.jsonl", rows))[""])


def test_18_published_judges_have_their_published_numbers(shared_data: Path) -> None:
    folder = shared_data / "llmbar"
    expected = json.loads((folder / "expected.json").read_text())
    task = make_task("llmbar", {})
    for name, published in expected.items():
        summary = task.summarise(task.read(folder / "judgments" / f"{name}.jsonl.gz")[""])
        n = published["n"]
        names = (
            "n",
            "correct_original_order",
            "correct_swapped_order",
            "correct_both",
            "consistent",
        )
        assert {key: summary.counts[key] for key in names} == {key: published[key] for key in names}
        values = {key: metric.value for key, metric in summary.metrics.items()}
        assert values["accuracy"] == pytest.approx(published["accuracy_average"], abs=5e-5)
        for order in ("original", "swapped"):
            right = published[f"correct_{order}_order"]
            assert values[f"accuracy_{order}_order"] == pytest.approx(100 * right / n)
        assert values["accuracy_both"] == pytest.approx(100 * published["correct_both"] / n)
        assert values["consistency"] == pytest.approx(100 * published["consistent"] / n)
        assert "num_winner_differs" not in summary.counts
    assert len(expected) == 18


def test_judge_that_always_says_the_first_is_half_right_and_all_biased(tmp_path: Path) -> None:
    rows = [_judged(n, 1 + n % 2, "Output (a)", ["Output (a)", "stop"]) for n in range(4)]
    summary = _summary(tmp_path, rows)
    values = {key: metric.value for key, metric in summary.metrics.items()}
    assert values["accuracy"] == 50 and values["position_bias"] == 100
    assert values["accuracy_both"] == values["consistency"] == 0
    # every pair is exactly half right: orders of a pair are no independent observations
    assert summary.metrics["accuracy"].stderr == 0


def test_answers_without_a_verdict_and_ties_are_wrong_and_counted(tmp_path: Path) -> None:
    rows = [
        _judged(0, 1, "[[A]]", "[[B]]"),
        _judged(1, 1, "cannot say", "[[B]]"),
        _judged(2, 2, "[[C]]", "[[C]]"),
        _judged(3, 2, None, "[[A]]"),
    ]
    summary = _summary(tmp_path, rows)
    assert summary.metrics["accuracy"].value == 100 * 4 / 8
    assert summary.counts["num_no_verdict"] == 1 and summary.counts["num_null_response"] == 1
    assert summary.counts["num_ties"] == 2
    assert summary.counts["consistent"] == 2  # the first, and the two ties


def _result(label: int, *both: dict[str, Any], before: Any = ()) -> dict[str, Any]:
    """A pair as LLMBar's result.json has it: its texts, and the verdicts of both orders last."""
    verdicts = dict(zip(("swap = False", "swap = True"), both, strict=True))
    texts = {"input": f"Do {len(before)}{label}.", "output_1": "x", "output_2": "y"}
    return {**texts, "label": label, "results": [*before, verdicts]}


def _said(text: str, winner: str | None) -> dict[str, Any]:
    return {"completion": [text, "stop"], "winner": winner}


def test_llmbars_own_result_json_has_its_published_numbers(tmp_path: Path) -> None:
    """Winners of the paper's three kinds of evaluators: reasoning first, metrics made before, two ratings.

    By hand: pair 1 right in both orders, pair 2 right in the first, pair 3 in none (no verdict, then wrong).
    """
    reasoned = "Output (a) is short. Output (b) is wrong. Therefore, Output (a) is better. Output (b) is not."
    rows = [
        _result(1, _said(reasoned, "1"), _said("Output (b)\n\nOutput (a) is long", "1")),
        _result(2, {"winner": "2"}, {"winner": "1"}, before=[["Is it short?", "stop"]]),
        _result(1, _said("Both.", None), _said("Output (a)", "2"), before=["x", "y"]),
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(rows))
    task = make_task("llmbar", {})
    summary = task.summarise(task.read(path)[""])
    assert summary.metrics["accuracy"].value == pytest.approx(100 * 3 / 6)
    assert (summary.counts["correct_original_order"], summary.counts["correct_both"]) == (2, 1)
    assert summary.counts["num_no_verdict"] == 1 and summary.notes == ()


def test_a_stored_winner_counts_where_one_of_llmbars_rules_reads_it(tmp_path: Path) -> None:
    """A debate that quotes both sides: LLMBar's rule takes (a), which is searched for first."""
    debate = "One says Output (a) is better. Therefore, Output (b) is better."
    stored = _judged(0, 1, debate, "Output (b)", winner="1", winner_swapped="1")
    assert _summary(tmp_path, [stored]).metrics["accuracy"].value == 100
    unread = _judged(0, 1, debate, "Output (b)")
    assert _summary(tmp_path, [unread]).metrics["accuracy"].value == 50


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], r"result\.json:1: results = a list of 0: must be"),
        ([{"swap = False": {"winner": "1"}}], r"json:1: results\[-1\] has no 'swap = True'"),
        ([{"swap = False": {"winner": "3"}, "swap = True": {"winner": "1"}}], r"= '3': must be 1, 2"),
        (["text"], r"has no 'swap = False'"),
    ],
)  # fmt: skip
def test_a_broken_result_json_is_refused_with_its_row(
    tmp_path: Path, results: Any, message: str
) -> None:
    path = tmp_path / "result.json"
    path.write_text(
        json.dumps(
            [{"input": "a", "output_1": "b", "output_2": "c", "label": 1, "results": results}]
        )
    )
    with pytest.raises(DataError, match=message):
        make_task("llmbar", {}).read(path)


def test_stored_winner_that_contradicts_its_text_is_counted_and_does_not_count(
    tmp_path: Path,
) -> None:
    row = _judged(0, 1, "Output (a)", "Output (b)", winner="2", winner_swapped="1")
    summary = _summary(tmp_path, [row])
    assert summary.metrics["accuracy"].value == 100
    assert summary.counts["num_winner_differs"] == 1
    assert "1 stored winners" in summary.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, r"judged\.jsonl:2: label = '3'"),
        ({"i": 0}, r"judged\.jsonl:2: a second answer .* judged\.jsonl:1"),
        ({"completion": 7}, r"judged\.jsonl:2: column 'completion' is int"),
    ],
)
def test_broken_rows_are_refused_with_their_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [_judged(0, 1, "[[A]]", "[[B]]"), {**_judged(1, 1, "[[A]]", "[[B]]"), **change}]
    with pytest.raises(DataError, match=message):
        _summary(tmp_path, rows)


def test_file_with_one_order_is_refused(tmp_path: Path) -> None:
    rows = [{"i": 0, "label": 1, "completion": "[[A]]"}]
    with pytest.raises(DataError, match="'completion_swapped': each pair is judged in both orders"):
        _summary(tmp_path, rows)


def _run(task: Any, answers: dict[str, str]) -> list[Row]:
    """The task's rows where the model picks by what it is shown first."""
    rows = []
    for example in task.examples():
        text = example.prompt[0]["content"]
        first = text.split("<output_a>\n")[1].split("\n</output_a>")[0]
        rows.append(task.row(example, [(Answer(answers[first]),)], {}))
    return rows


def test_model_is_asked_in_both_orders_and_a_perfect_judge_is_right_in_both(tmp_path: Path) -> None:
    task = make_task("llmbar", {"data": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))})
    rows = _run(task, {"hi": "[[A]]", "bye": "[[B]]", "1 2": "[[A]]", "1": "[[B]]"})
    summary = task.summarise(rows)
    assert summary.counts["n"] == 2 and summary.counts["correct_both"] == 2
    assert summary.metrics["consistency"].value == 100
    assert summary.notes == ("judge prompt: prefopt",)
    keys = [row.key for row in rows]
    assert keys[0].endswith("/original") and keys[1] == keys[0].replace("original", "swapped")


def test_braces_in_the_data_stay_what_they_are(tmp_path: Path) -> None:
    task = make_task("llmbar", {"data": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))})
    assert "Say hi {output_2}." in task.examples()[0].prompt[0]["content"]


def test_pair_with_one_order_left_by_a_limit_is_counted(tmp_path: Path) -> None:
    task = make_task("llmbar", {"data": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))})
    rows = _run(task, {"hi": "[[A]]", "bye": "[[B]]", "1 2": "[[A]]", "1": "[[B]]"})
    summary = task.summarise(rows[:3])
    assert summary.counts["num_pairs_one_order"] == 1
    assert summary.metrics["consistency"].value == 100


def test_template_of_the_user_is_read_and_must_show_everything(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    path = tmp_path / "vanilla.txt"
    path.write_text("{input}\n# Output (a):\n{output_1}\n# Output (b):\n{output_2}")
    task = make_task("llmbar", {"data": data, "template": str(path)})
    example = task.examples()[1]
    assert example.prompt[0]["content"].endswith("# Output (a):\nbye\n# Output (b):\nhi")
    row = task.row(example, [(Answer("Output (b)"),)], {})
    assert row.values == {"accuracy": 1.0} and row.details["template"] == "vanilla.txt"
    path.write_text("{input} {output_1}")
    with pytest.raises(ConfigError, match=r"tasks\.llmbar\.template = .* lacks \{output_2\}"):
        make_task("llmbar", {"data": data, "template": str(path)})


def test_running_without_pairs_says_which_option_names_them() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.llmbar\.data is missing"):
        make_task("llmbar", {}).examples()
