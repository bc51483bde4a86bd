"""Comparing evaluations: pairing by key, what is left out, damaged files, the command."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from eval.base import Metric, Row, Summary
from eval.comparison.compare import compare, comparison_json, print_comparison
from eval.comparison.paired import holm
from eval.registry import make_task
from eval.statistics import mean_metric
from prefopt.errors import ConfigError, DataError
from tests.eval.result_dirs import A, B, entry, scored, write_output


def only_pair(found: Any) -> dict[str, Any]:
    """The one paired difference of a comparison, as its JSON has it."""
    (task,) = comparison_json(found)["tasks"].values()
    (pair,) = task["differences"]
    return pair


# -- pairing ---------------------------------------------------------------------------------------------------


def test_examples_are_paired_by_key_whatever_their_order(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A)
    straight = compare([a, scored(tmp_path / "b", B)], force=False)
    shuffled = compare([a, scored(tmp_path / "c", dict(reversed(B.items())))], force=False)
    one, other = only_pair(straight), only_pair(shuffled)
    # 3 won, 1 lost of 5: +40 points; two-sided binomial 3 of 4: 10/16.
    assert one["mean"] == pytest.approx(40) and one["p_value"] == pytest.approx(10 / 16)
    assert (one["num_wins"], one["num_losses"], one["num_ties"]) == (3, 1, 1)
    assert one | {"second": "c"} == other


def test_published_gsm8k_solutions_differ_as_their_published_labels_do(
    tmp_path: Path, shared_data: Path
) -> None:
    path = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    task = make_task("gsm8k")
    rows = task.read(path)
    models = ("6b_finetuning", "175b_verification")
    outputs = [
        write_output(tmp_path / model, {"gsm8k": (entry(task.summarise(rows[model])), rows[model])})
        for model in models
    ]
    with gzip.open(path, "rt") as file:
        labels = [[json.loads(line)[model]["is_correct"] for model in models] for line in file]
    won = sum(b and not a for a, b in labels)
    lost = sum(a and not b for a, b in labels)
    found = only_pair(compare(outputs, force=False))
    assert (found["num_wins"], found["num_losses"], found["n"]) == (won, lost, 1319)
    assert found["mean"] == pytest.approx(100 * (742 - 286) / 1319)
    assert found["p_value"] == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-6)
    assert found["interval"][0] < found["mean"] < found["interval"][1]


def test_examples_of_one_side_and_those_without_a_value_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = scored(tmp_path / "a", A | {"k1": None, "only": 1.0})
    b = scored(tmp_path / "b", B | {"more": 0.0, "most": 0.0})
    found = compare([a, b], force=False)
    pair = only_pair(found)
    assert (pair["num_only_first"], pair["num_only_second"]) == (1, 2)
    assert (pair["num_without_value"], pair["n"]) == (1, 4)
    print_comparison(found)
    output = capsys.readouterr().out
    assert "2 examples only b has, left out" in output
    assert "1 example without a value on one side or both, left out" in output


def test_examples_without_a_common_key_have_no_difference_and_say_why(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / "a", {"x": 1.0}), scored(tmp_path / "b", {"y": 1.0})]
    pair = only_pair(compare(outputs, force=False))
    assert "no example in common" in pair["unpaired"] and "mean" not in pair


def test_every_later_result_is_compared_with_the_first_that_has_the_task(tmp_path: Path) -> None:
    def output(name: str, *tasks: str) -> Path:
        rows = [Row(key, {"accuracy": value}) for key, value in A.items()]
        made = entry(Summary({"accuracy": mean_metric([*A.values()], 100)}, {"n": 5}))
        return write_output(tmp_path / name, dict.fromkeys(tasks, (made, rows)))

    found = compare(
        [output("a", "x", "alone"), output("b", "x", "y"), output("c", "x", "y")], force=False
    )
    pairs = {t.name: [(p.first, p.second) for p in t.pairs] for t in found.tasks}
    assert pairs == {"x": [("a", "b"), ("a", "c")], "y": [("b", "c")]}
    assert found.alone == {"alone": "a"}
    assert {task.name: task.without for task in found.tasks} == {"x": (), "y": ("a",)}


def test_lower_is_a_win_where_lower_is_better(tmp_path: Path) -> None:
    outputs = [
        scored(tmp_path / "a", A, direction="lower"),
        scored(tmp_path / "b", B, direction="lower"),
    ]
    pair = only_pair(compare(outputs, force=False))
    assert (pair["num_wins"], pair["num_losses"]) == (1, 3)
    assert [each["key"] for each in pair["wins"]] == ["k4"]


def test_what_only_describes_has_no_winner(tmp_path: Path) -> None:
    outputs = [
        scored(tmp_path / name, values, direction="none") for name, values in (("a", A), ("b", B))
    ]
    pair = only_pair(compare(outputs, force=False))
    assert (pair["num_higher"], pair["num_lower"]) == (3, 1) and "num_wins" not in pair


def test_a_headline_that_is_no_mean_of_rows_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(name: str, values: dict[str, float], controlled: float) -> Path:
        summary = Summary(
            {"lc": Metric(controlled, 1.5), "win_rate": mean_metric([*values.values()], 100)}, {}
        )
        rows = [Row(key, {"win_rate": value}) for key, value in values.items()]
        return write_output(tmp_path / name, {"alpaca": (entry(summary), rows)})

    found = compare([output("a", A, 31.0), output("b", B, 64.5)], force=False)
    result = comparison_json(found)["tasks"]["alpaca"]
    assert not result["headline_is_mean_of_paired_value"]
    assert (result["paired_value"], result["unit"]) == ("win_rate", "percentage points")
    print_comparison(found)
    assert "lc is no plain mean over examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"k": 4.0, "l": 9.0}, {"k": 7.0, "l": 9.0}, 1.5),  # ratings from 1 to 10
        ({"k": 0.1, "l": 0.2}, {"k": 0.4, "l": 0.6}, 0.35),  # nats: below 1, but no shares
    ],
)
def test_differences_are_in_the_unit_of_the_headline(
    tmp_path: Path, a: dict[str, float], b: dict[str, float], expected: float
) -> None:
    outputs = [scored(tmp_path / name, values, scale=1) for name, values in (("a", a), ("b", b))]
    (task,) = compare(outputs, force=False).tasks
    difference = task.pairs[0].difference
    assert difference is not None and difference.mean == pytest.approx(expected)
    assert task.of_rows and task.unit == "units of accuracy"


def test_the_largest_differences_are_shown_each_way(tmp_path: Path) -> None:
    a = {f"k{n}": 0.5 for n in range(9)}
    b = a | {"k3": 0.9, "k5": 0.8, "k7": 0.6, "k1": 0.1}
    texts = {key: (f"prompt {key}", f"answer {key}") for key in a}
    outputs = [scored(tmp_path / n, v, texts=texts) for n, v in (("a", a), ("b", b))]
    (task,) = compare(outputs, force=False, shown=2).tasks
    (pair,) = task.pairs
    assert [each.key for each in pair.wins] == ["k3", "k5"]
    assert [(each.key, round(each.difference, 6)) for each in pair.losses] == [("k1", -0.4)]
    assert (pair.wins[0].first.prompt, pair.wins[0].second.answer) == ("prompt k3", "answer k3")


def test_p_values_are_corrected_over_tasks_and_results(tmp_path: Path) -> None:
    def output(name: str, right: int) -> Path:
        tasks = {}
        for task, extra in (("x", 0), ("y", 4)):
            values = {f"k{n}": float(n < right + extra) for n in range(30)}
            summary = Summary({"accuracy": mean_metric([*values.values()], 100)}, {"n": 30})
            rows = [Row(k, {"accuracy": v}) for k, v in values.items()]
            tasks[task] = (entry(summary), rows)
        return write_output(tmp_path / name, tasks)

    found = compare([output("a", 5), output("b", 12), output("c", 20)], force=False)
    pairs = [pair for task in found.tasks for pair in task.pairs]
    raw = [pair.difference.p_value for pair in pairs if pair.difference]
    assert len(raw) == 4
    assert [pair.p_holm for pair in pairs] == pytest.approx(holm(raw))


def test_ten_thousand_stored_examples_compare_in_seconds_and_little_memory(tmp_path: Path) -> None:
    filler = "word " * 400
    for name, step in (("a", 3), ("b", 2)):
        values = {f"k{n}": (n % step) / step for n in range(10_000)}
        scored(tmp_path / name, values, texts=dict.fromkeys(values, (filler, filler)))
    script = (
        "import sys; from pathlib import Path; from eval.comparison.compare import compare\n"
        "compare([Path(sys.argv[1]), Path(sys.argv[2])], force=False)\n"
        # Not ru_maxrss, which a child inherits from the process that started it.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 300 * 2**20  # the two files are 80 MB


# -- bad input -------------------------------------------------------------------------------------------------


def _break_results(output: Path) -> None:
    (output / "results.json").write_text('{"tasks": ')


def _no_tasks(output: Path) -> None:
    (output / "results.json").write_text("[]")


def _no_headline(output: Path) -> None:
    path = output / "results.json"
    path.write_text(path.read_text().replace('"headline": "accuracy"', '"headline": "score"'))


def _no_metrics(output: Path) -> None:
    path = output / "results.json"
    path.write_text(path.read_text().replace('"metrics"', '"numbers"'))


def _no_examples(output: Path) -> None:
    (output / "quiz" / "examples.jsonl").unlink()


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        path = output / "quiz" / "examples.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_results, r"b/results\.json: is not a results file .* it is cut or edited"),
        (_no_tasks, r"b/results\.json: is not a results file .*: it h"),
        (_no_headline, r"b/results\.json: tasks\.quiz: its headline 'score'"),
        (_no_metrics, r"b/results\.json: tasks\.quiz .*'metrics'"),
        (_no_examples, r"b/quiz/examples\.jsonl: no such file"),
        (
            _lines(lambda lines: [*lines, lines[1]]),
            r"examples\.jsonl:6: key 'k2' a second time; the first is on line 2",
        ),
        (_lines(lambda lines: [lines[0], "{broken\n"]), r"examples\.jsonl:2: it is cut or edited"),
        (_lines(lambda lines: ["[1]\n"]), r"examples\.jsonl:1: must be"),
        (
            _lines(lambda lines: [lines[0], lines[1].replace("1.0", '"yes"')]),
            r"examples\.jsonl:2: accuracy = 'yes': must be a number",
        ),
    ],
)
def test_damaged_results_are_named_by_file_and_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    a, b = scored(tmp_path / "a", A), scored(tmp_path / "b", B)
    damage(b)
    with pytest.raises(DataError, match=message):
        compare([a, b], force=False)


def test_directories_without_results_are_named(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A)
    with pytest.raises(DataError, match="nowhere: no such directory"):
        compare([a, tmp_path / "nowhere"], force=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no results\.json"):
        compare([a, tmp_path / "empty"], force=False)


def test_one_result_or_one_twice_is_no_comparison(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", A)
    with pytest.raises(ConfigError, match="at least two"):
        compare([a], force=False)
    with pytest.raises(ConfigError, match="given twice"):
        compare([a, a / "results.json"], force=False)


def test_results_without_a_common_task_are_refused_naming_theirs(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / "a", A, task="x"), scored(tmp_path / "b", B, task="y")]
    with pytest.raises(ConfigError, match=r"a: x; b: y"):
        compare(outputs, force=False)


def test_tasks_of_the_harness_are_found_in_their_folders(tmp_path: Path) -> None:
    outputs = [
        scored(tmp_path / n, v, task="lm_eval:mmlu", kind="harness", config_hash="c")
        for n, v in (("a", A), ("b", B))
    ]
    assert only_pair(compare(outputs, force=False))["mean"] == pytest.approx(40)


# -- the command -----------------------------------------------------------------------------------------------


def test_command_prints_json_writes_a_page_and_refuses_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eval.cli import main

    a, b = scored(tmp_path / "a", A), scored(tmp_path / "b", B)
    output = tmp_path / "comparison"
    assert main(["compare", str(a), str(b), "--json", "--output", str(output)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / "comparison.json").read_text())
    assert printed["tasks"]["quiz"]["differences"][0]["mean"] == pytest.approx(40)
    assert (output / "comparison.html").read_text().startswith("<!doctype html>")

    c = scored(tmp_path / "c", B, version="2")
    assert main(["compare", str(a), str(c)]) == 2
    assert "the task's version differs: 1 (a), 2 (c)" in capsys.readouterr().err
    assert main(["compare", str(a), str(c), "--force"]) == 0


def test_json_is_strict_also_where_there_is_no_number(tmp_path: Path) -> None:
    def output(name: str) -> Path:
        rows = [Row("k", {"accuracy": None}, problem="no_verdict")]
        summary = Summary({"accuracy": Metric(float("nan"))}, {"n": 1, "num_no_verdict": 1})
        return write_output(tmp_path / name, {"quiz": (entry(summary), rows)})

    found = compare([output("a"), output("b")], force=False)
    text = json.dumps(comparison_json(found), allow_nan=False)
    assert json.loads(text)["tasks"]["quiz"]["results"]["a"]["metrics"]["accuracy"]["value"] is None
    print_comparison(found)
