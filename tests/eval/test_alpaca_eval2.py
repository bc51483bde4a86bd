"""AlpacaEval 2 against its published leaderboard, its own judge's log-probs, and values derived by hand."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from eval.base import Answer, Example, Judgment
from eval.registry import make_task
from eval.score import score_file
from eval.sources import file_rows, text_key
from eval.tasks._alpaca_instructions import instruction_number
from eval.tasks._alpaca_judge import judge_messages, load_template, model_win
from prefopt.cli import main
from prefopt.errors import ConfigError, DataError
from tests.eval.runs import read_jsonl, write_chat_model, write_jsonl
from tests.signals.chat_server import Answer as Reply
from tests.signals.chat_server import chat_server

MODELS = (
    "FuseChat-Llama-3.1-8B-Instruct",
    "FuseChat-Gemma-2-9B-Instruct",
    "claude-2",
    "gpt-3.5-turbo-1106",
    "gemma-7b-it",
    "vicuna-7b-v1.5",
    "alpaca-7b",
)
REFERENCE = "model_outputs/gpt4_1106_preview.reference.json.gz"


@pytest.fixture
def alpaca(shared_data: Path) -> Path:
    return shared_data / "alpacaeval2"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def published(alpaca: Path, model: str) -> dict[str, Any]:
    return json.loads((alpaca / "expected.json").read_text())[model]


def annotated(alpaca: Path, model: str) -> list[dict[str, Any]]:
    return [row.data for row in file_rows(alpaca / "annotations" / f"{model}.jsonl.gz")]


def json_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))


def score(path: Path, **options: Any) -> dict[str, Any]:
    return score_file("alpaca_eval2", path, {k: str(v) for k, v in options.items()})


def rescored(
    tmp_path: Path, alpaca: Path, rows: Iterable[Mapping[str, Any]], **options: Any
) -> dict[str, Any]:
    return score(write_jsonl(tmp_path / "rows.jsonl", rows), calibration=alpaca, **options)


def made_up(number: int, preference: Any, **columns: Any) -> dict[str, Any]:
    """An annotation of an instruction that is none of AlpacaEval's."""
    return {
        "instruction": f"Made up {number}",
        "output_1": "abc",
        "output_2": "abcdef",
        "preference": preference,
        **columns,
    }


# --- published numbers


@pytest.mark.parametrize("model", MODELS)
def test_published_numbers_come_out_of_published_annotations(alpaca: Path, model: str) -> None:
    expected = published(alpaca, model)
    result = score(alpaca / "annotations" / f"{model}.jsonl.gz")
    official = expected["published"]
    assert result["win_rate"] == pytest.approx(official["win_rate"], abs=1e-9)
    assert result["standard_error"] == pytest.approx(official["standard_error"], abs=1e-9)
    assert result["discrete_win_rate"] == pytest.approx(official["discrete_win_rate"], abs=1e-9)
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert result[name] == official[name], name
    controlled = result["length_controlled_winrate"]
    assert controlled == pytest.approx(official["length_controlled_winrate"], abs=0.16)
    # The official code under this scikit-learn; another version may stop liblinear elsewhere.
    recomputed = expected["recomputed_official_sklearn_1_9_1_lc"]
    assert controlled == pytest.approx(recomputed, abs=1e-5)
    stderr = expected["recomputed_official_sklearn_1_4_2"]["lc_standard_error"]
    assert result["lc_standard_error"] == pytest.approx(stderr, abs=1e-5)
    assert result["length_controlled_winrate_standard_error"] == result["lc_standard_error"]
    assert result["model"] == model and not any("instructions" in n for n in result["notes"])


def test_difficulties_are_matched_by_instruction_where_a_row_is_missing(alpaca: Path) -> None:
    """The published number of this file is 17.7: its difficulties are one row off from the missing one on."""
    expected = published(alpaca, "gpt35_turbo_instruct")
    result = score(alpaca / "annotations" / "gpt35_turbo_instruct.jsonl.gz")
    assert result["win_rate"] == pytest.approx(expected["published"]["win_rate"], abs=1e-9)
    assert result["length_controlled_winrate"] == pytest.approx(
        expected["aligned_exact_mle_lc"], abs=0.16
    )
    assert result["n_total"] == 804 and result["n_instructions_missing"] == 1
    assert any("1 of AlpacaEval's 805 instructions have no row" in n for n in result["notes"])


def test_the_order_of_rows_changes_nothing(alpaca: Path, tmp_path: Path) -> None:
    """Nor does the index column, which in published files is the row's position."""
    rows = annotated(alpaca, "claude-2")
    random.Random(0).shuffle(rows)
    shuffled = rescored(tmp_path, alpaca, [{**row, "index": n} for n, row in enumerate(rows)])
    straight = score(alpaca / "annotations" / "claude-2.jsonl.gz", calibration=alpaca)
    assert shuffled["length_controlled_winrate"] == straight["length_controlled_winrate"]
    assert shuffled["win_rate"] == pytest.approx(straight["win_rate"], abs=1e-10)


def test_half_of_the_instructions_are_each_given_their_own_difficulty(
    alpaca: Path, tmp_path: Path
) -> None:
    """Every other row, so that nearly all positions are off; the whole file's number is 28.2."""
    rows = annotated(alpaca, "claude-2")
    half = rows[::2]
    by_position = [{**row, "instruction": rows[n]["instruction"]} for n, row in enumerate(half)]
    found, wrong = (
        rescored(tmp_path, alpaca, each)["length_controlled_winrate"]
        for each in (half, by_position)
    )
    whole = published(alpaca, "claude-2")["published"]["length_controlled_winrate"]
    assert abs(found - whole) < 2 < 4 < abs(wrong - whole)


def test_instructions_have_the_numbers_of_the_published_reference_file(alpaca: Path) -> None:
    rows = json_rows(alpaca / REFERENCE)
    numbers = [instruction_number(text_key(row["instruction"])) for row in rows]
    assert numbers == list(range(805))
    assert instruction_number(text_key("Not one of them.")) is None


def test_preferences_are_recomputed_from_the_judges_published_log_probs(
    alpaca: Path, tmp_path: Path
) -> None:
    """Half of the rows were shown to the judge in the other order, which the file does not say."""
    rows = json_rows(alpaca / "raw_with_judge_logprobs" / "vicuna-7b.annotations.json.gz")
    without = [{k: v for k, v in row.items() if k != "preference"} for row in rows]
    task = make_task("alpaca_eval2")
    found = task.read(write_jsonl(tmp_path / "raw.jsonl", without))["vicuna-7b"]
    wins = [row.values["win_rate"] for row in found]
    assert wins == pytest.approx([row["preference"] - 1 for row in rows], abs=1e-9)
    leaderboard = 4.16261116226087, 0.6135107818067077
    result = rescored(tmp_path, alpaca, without)
    assert (result["win_rate"], result["standard_error"]) == pytest.approx(leaderboard, abs=1e-6)
    assert result["length_controlled_winrate"] == pytest.approx(6.277217738516609, abs=0.16)


def test_a_rescore_takes_little_beside_its_imports_and_loads_no_torch(alpaca: Path) -> None:
    """CPU time against CPU time: 0.6 s after 1.5 s of scikit-learn here, and in proportion on any machine."""
    code = (
        "import sys, time, sklearn.linear_model, sklearn.model_selection\n"
        "imported = time.process_time(); from prefopt.cli import main\n"
        f"main(['eval', 'score', 'alpaca_eval2', {str(alpaca / 'annotations/claude-2.jsonl.gz')!r}, '--json'])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert time.process_time() < 3 * imported, (time.process_time(), imported)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["length_controlled_winrate"] == pytest.approx(28.155, abs=0.16)


# --- files that are not as they should be


def test_a_duplicated_annotation_is_refused_naming_both_lines(tmp_path: Path) -> None:
    rows = [made_up(n, 1.0) for n in (0, 1, 2, 1)]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: a second annotation.*rows\.jsonl:2"):
        score(write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("missing", [None, -1, math.nan, ""], ids=str)
def test_a_missing_preference_is_counted_and_left_out(
    alpaca: Path, tmp_path: Path, missing: Any
) -> None:
    rows = annotated(alpaca, "claude-2")
    wins = [row["preference"] - 1 for row in rows[7:]]
    result = rescored(
        tmp_path, alpaca, [{**row, "preference": missing} for row in rows[:7]] + rows[7:]
    )
    assert result["win_rate"] == pytest.approx(100 * sum(wins) / 798, abs=1e-9)
    assert result["n_total"] == 798 and result["n_instructions_missing"] == 0
    assert result["n_without_preference"] == result["num_null_preference"] == 7
    assert result["length_controlled_winrate"] == pytest.approx(28.2, abs=1)


def test_an_answer_that_is_null_is_an_empty_one_and_counted(tmp_path: Path) -> None:
    rows = [made_up(0, 1.0, output_2=None), made_up(1, 2.0)]
    result = score(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert result["num_null_response"] == 1 and result["win_rate"] == 50.0
    assert result["avg_length"] == 3.0  # (0 + 6) / 2


@pytest.mark.parametrize("wrong", [2.5, 0.3, -2, "yes", [1]])
def test_a_preference_that_is_none_is_refused_naming_line_and_value(
    tmp_path: Path, wrong: Any
) -> None:
    rows = [made_up(0, 1.0), made_up(1, wrong)]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: preference = .* must be in \[1, 2\]"):
        score(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_a_file_of_model_outputs_is_no_file_of_annotations(tmp_path: Path) -> None:
    rows = [{"instruction": "Hello", "output": "Hi", "generator": "x"}]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: neither 'preference' nor 'raw_completion'"
    ):
        score(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_a_file_in_which_nothing_was_judged_says_why(tmp_path: Path) -> None:
    rows = [made_up(n, None) for n in range(3)]
    with pytest.raises(DataError, match=r"none of the 3 rows .*num_null_preference 3"):
        score(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_models_in_one_file_are_told_apart(tmp_path: Path) -> None:
    rows = [made_up(n, 1.0 + p, generator_2=m) for n in (0, 1) for m, p in (("a", 0), ("b", 1))]
    models = score(write_jsonl(tmp_path / "rows.jsonl", rows))["models"]
    assert {name: each["win_rate"] for name, each in models.items()} == {"a": 0.0, "b": 100.0}


# --- the numbers, by hand


def test_wins_draws_and_rates_by_hand(tmp_path: Path) -> None:
    """Wins 0, 1, 0.5, 0.5 and 0.75: mean 0.55.

    Squared deviations: 0.3025 + 0.2025 + 0.0025 + 0.0025 + 0.04 = 0.55; 0.55 / 4 / 5 = 0.0275 is the sem's square.
    Discrete: 2 wins, 1 loss, 2 draws of 5: (2 + 1) / 5.
    """
    rows = [made_up(n, p) for n, p in enumerate([1.0, 2.0, 1.5, 0, 1.75])]
    result = score(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert result["win_rate"] == pytest.approx(55.0, abs=1e-12)
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(0.0275), abs=1e-12)
    assert result["discrete_win_rate"] == pytest.approx(60.0)
    counts = [result[name] for name in ("n_wins", "n_wins_base", "n_draws", "n_total")]
    assert counts == [2, 1, 2, 5]


def test_instructions_of_others_have_no_length_controlled_win_rate(tmp_path: Path) -> None:
    result = score(write_jsonl(tmp_path / "rows.jsonl", [made_up(0, 1.0), made_up(1, 2.0)]))
    assert result["length_controlled_winrate"] is None and result["win_rate"] == 50.0
    assert any("no instruction is one of AlpacaEval's" in note for note in result["notes"])


def test_the_baseline_against_itself_is_fifty(alpaca: Path, tmp_path: Path) -> None:
    """By the names in the file, and by the answers where it has no names."""
    rows = [
        {**row, "generator_2": row["generator_1"], "output_2": row["output_1"], "preference": 1.5}
        for row in annotated(alpaca, "claude-2")
    ]
    unnamed = [{k: v for k, v in row.items() if "generator" not in k} for row in rows]
    for each in (rows, unnamed):
        result = rescored(tmp_path, alpaca, each)
        assert result["win_rate"] == result["length_controlled_winrate"] == 50.0
        assert result["n_draws"] == result["n_total"] == 805


def test_what_length_adds_is_taken_out_and_said_where_it_is_much(
    alpaca: Path, tmp_path: Path
) -> None:
    """Preferences made with the regression's own equation, for a model whose answers are mostly much longer.

    logit P = -1.6 tanh(d) + 0.9 difficulty - 1.5, d the length difference in standard deviations; the truth is
    the mean without the first term. The gamed rows, whose φ and γ are others, pull the estimate by a point.
    """
    table = csv.DictReader((alpaca / "df_gamed.csv").read_text().splitlines())
    difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in table}
    draw = random.Random(0)
    deltas = [draw.choice([-900, -700, -500, -300, 100]) for _ in range(805)]
    rows, at_equal_length = [], []
    for number, row in enumerate(annotated(alpaca, "claude-2")):
        merit = 0.9 * difficulty[number] - 1.5
        length = 1.6 * math.tanh(deltas[number] / statistics.stdev(deltas))
        at_equal_length.append(100 / (1 + math.exp(-merit)))
        output = "x" * (len(row["output_1"]) - deltas[number])
        rows.append(
            {**row, "output_2": output, "preference": 1 + 1 / (1 + math.exp(length - merit))}
        )
    truth = sum(at_equal_length) / 805
    result = rescored(tmp_path, alpaca, rows)
    assert result["win_rate"] > truth + 15
    assert result["length_controlled_winrate"] == pytest.approx(truth, abs=2)
    assert any("far from the raw one" in note for note in result["notes"])


def test_another_baseline_than_the_calibrations_is_said(alpaca: Path, tmp_path: Path) -> None:
    rows = [{**row, "generator_1": "davinci"} for row in annotated(alpaca, "claude-2")]
    notes = rescored(tmp_path, alpaca, rows)["notes"]
    assert any("for the baseline gpt4_1106_preview; here it is davinci" in note for note in notes)


@pytest.mark.parametrize(
    ("top", "first", "win"),
    [
        ({"m": math.log(0.6), "M": math.log(0.2)}, False, 0.25),
        ({"m": math.log(0.6), "M": math.log(0.2)}, True, 0.75),
        ({"M": -3.0, "The": -0.1}, False, 1.0),
        ({"M": -3.0, "The": -0.1}, True, 0.0),
        ({"m": -3.0}, False, 0.0),
        ({"The": -0.1, " m": -2.0}, False, None),
        ({}, True, None),
        ({"m": 0.0, "M": -9999.0}, False, 0.0),
        ({"m": -9999.0, "M": 0.0}, False, 1.0),
    ],
)
def test_a_preference_is_the_share_of_the_two_names(
    top: dict[str, float], first: bool, win: float | None
) -> None:
    """0.2 / (0.6 + 0.2) for the answer called M; a name that is not there has probability 0."""
    assert model_win(top, first=first) == (win if win is None else pytest.approx(win, abs=1e-15))


# --- calibration


def test_the_calibration_is_found_beside_the_file_or_above_it(alpaca: Path, tmp_path: Path) -> None:
    (tmp_path / "df_gamed.csv").write_bytes((alpaca / "df_gamed.csv").read_bytes())
    folder = tmp_path / "results" / "model"
    folder.mkdir(parents=True)
    path = write_jsonl(folder / "rows.jsonl", annotated(alpaca, "alpaca-7b"))
    result = score(path)
    assert result["length_controlled_winrate"] == pytest.approx(5.8755, abs=0.16)
    assert any(str(tmp_path / "df_gamed.csv") in note for note in result["notes"])


@pytest.mark.usefixtures("no_hub")
def test_without_a_calibration_every_place_that_was_searched_is_named(
    alpaca: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    path = write_jsonl(folder / "rows.jsonl", annotated(alpaca, "alpaca-7b")[:9])
    with pytest.raises(ConfigError) as error:
        score(path)
    text = str(error.value)
    places = [str(path.parent), str(tmp_path), "alpaca_eval", "tatsu-lab/alpaca_eval"]
    assert all(place in text for place in [*places, "df_gamed.csv", "--calibration DIR"])


def test_a_calibration_folder_without_the_file_is_refused(alpaca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration = .*there is no df_gamed\.csv in it"):
        rescored(tmp_path, tmp_path, annotated(alpaca, "alpaca-7b")[:9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:400], "holds 399 instructions, must hold 0 to 804"),
        (
            lambda lines: [lines[0], lines[1].replace(",0,", ",zero,", 1), *lines[2:]],
            "csv:2: index",
        ),
        (lambda lines: [lines[0].replace("preference", "wins"), *lines[1:]], "no column 'pref"),
    ],
    ids=["cut off", "no number", "no column"],
)
def test_a_damaged_calibration_is_refused(
    alpaca: Path, tmp_path: Path, damage: Callable[[list[str]], list[str]], message: str
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    lines = (alpaca / "df_gamed.csv").read_text().splitlines(keepends=True)
    (folder / "df_gamed.csv").write_text("".join(damage(lines)))
    path = write_jsonl(tmp_path / "rows.jsonl", annotated(alpaca, "alpaca-7b")[:9])
    with pytest.raises(DataError, match=message):
        score(path, calibration=folder)


# --- the judge


def example(number: int = 0) -> Example:
    text = f"Made up {number}"
    return Example(text_key(text), text, {"instruction": text, "dataset": None})


def judged(answer: str, theirs: str, judgment: Judgment | None, number: int = 0) -> Any:
    task = make_task("alpaca_eval2")
    questions = task.questions(example(number), [(Answer(answer),)], [(Answer(theirs),)])
    judgments = {each.id: judgment for each in questions if judgment is not None}
    return questions, task.row(example(number), [(Answer(answer),)], judgments)


def test_a_judge_that_prefers_the_model_does_so_in_either_order() -> None:
    orders = set()
    for number in range(12):
        (question,), _ = judged("OURS", "THEIRS", None, number)
        text = question.messages[-1]["content"]
        first = text.index("OURS") < text.index("THEIRS")
        orders.add(first)
        names = ["m", "M"] if first else ["M", "m"]
        top = dict(zip(names, (math.log(0.9), math.log(0.1)), strict=True))
        _, row = judged("OURS", "THEIRS", Judgment("", top_logprobs=top), number)
        assert row.values["win_rate"] == pytest.approx(0.9) and row.problem is None
    assert orders == {True, False}


def test_the_judge_is_asked_once_as_published_and_equal_answers_not_at_all() -> None:
    task = make_task("alpaca_eval2")
    assert task.judge_sampling == {
        "max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 5
    }  # fmt: skip
    assert task.max_asks == 1 and task.baseline == "published"
    questions, row = judged("same", "same", None)
    assert questions == [] and row.values["win_rate"] == 0.5 and row.problem is None


@pytest.mark.parametrize(
    ("judgment", "problem"),
    [
        (Judgment("m"), "no_logprobs"),
        (Judgment("I", top_logprobs={"I": -0.1}), "no_verdict"),
        (Judgment("", refused="HTTP 400: too long"), "judge_refused"),
    ],
)
def test_a_judgment_without_a_preference_is_counted_by_why(
    judgment: Judgment, problem: str
) -> None:
    good = Judgment("m", top_logprobs={"m": -0.1, "M": -9.0})
    rows = [judged("a", "bb", each, n)[1] for n, each in enumerate([judgment, good])]
    assert rows[0].values == {"win_rate": None} and rows[0].problem == problem
    summary = make_task("alpaca_eval2").summarise(rows)
    assert summary.counts[f"num_{problem}"] == summary.counts["n_without_preference"] == 1
    assert summary.counts["n_total"] == 1
    said = any("without log-probs" in note for note in summary.notes)
    assert said == (problem == "no_logprobs")


def test_an_answer_that_is_not_there_is_judged_as_an_empty_one_and_counted() -> None:
    task = make_task("alpaca_eval2")
    ours, theirs = Answer("", problem="prompt_too_long"), Answer("text")
    (question,) = task.questions(example(), [(ours,)], [(theirs,)])
    top = {"m": -0.1, "M": -3.0}
    row = task.row(example(), [(ours,)], {question.id: Judgment("m", top_logprobs=top)})
    assert row.problem == "prompt_too_long" and row.values["win_rate"] is not None
    assert row.details["length"] == 0


# --- templates


def test_the_published_template_becomes_chat_messages(alpaca: Path) -> None:
    path = alpaca / "judge_prompt_alpaca_eval_clf.txt"
    template = load_template("tasks.alpaca_eval2.template", str(path))
    assert template.origin == path.name
    system, user = judge_messages(template, "Say {output_2}", "<|im_end|> one", "two")
    assert (system["role"], user["role"]) == ("system", "user")
    assert '"instruction": """Say {output_2}""",' in user["content"]
    assert '"output": """<|im_end|> one"""' in user["content"]
    assert user["content"].startswith("I require") and user["content"].endswith("Identifier")
    assert "<|im_" not in system["content"] and "{\n    {\n" in user["content"]


def test_the_template_is_the_installed_packages_else_our_own(
    alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "tasks.alpaca_eval2.template"
    own = load_template(option, None)
    assert own.origin == "prefopt"
    contents = [message["content"] for message in judge_messages(own, "I?", "one", "two")]
    assert "I?" in contents[-1] and contents[-1].index("one") < contents[-1].index("two")
    folder = tmp_path / "alpaca_eval" / "evaluators_configs" / "alpaca_eval_clf_gpt4_turbo"
    folder.mkdir(parents=True)
    text = (alpaca / "judge_prompt_alpaca_eval_clf.txt").read_text()
    (folder / "alpaca_eval_clf.txt").write_text(text)
    (tmp_path / "alpaca_eval" / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    packaged = load_template(option, None)
    assert packaged.origin == "alpaca_eval" and packaged.sha256 != own.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{instruction} {output_1}", r"needs \{output_2\}"),
        ("<|im_start|>user\n{instruction} {output_1} {output_2}", "does not end"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_task("alpaca_eval2", {"template": str(path)})
    with pytest.raises(ConfigError, match=r"tasks\.alpaca_eval2\.template = .*cannot be read"):
        make_task("alpaca_eval2", {"template": str(tmp_path / "none.txt")})


def test_a_template_without_roles_is_one_user_message(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("{instruction}: {output_1} or {output_2}?\n")
    template = load_template("tasks.alpaca_eval2.template", str(path))
    messages = judge_messages(template, "I", "one", "two")
    assert messages == ({"role": "user", "content": "I: one or two?"},)


# --- examples and the baseline's answers


def test_the_baselines_answers_are_matched_by_instruction(alpaca: Path, tmp_path: Path) -> None:
    rows = json_rows(alpaca / REFERENCE)[:20]
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": r["instruction"]} for r in rows])
    theirs = write_jsonl(tmp_path / "baseline.jsonl", reversed(rows))
    options = {"data": str(data), "baseline_data": str(theirs), "calibration": str(alpaca)}
    task = make_task("alpaca_eval2", options)
    examples = task.examples()
    answers = task.baseline_answers(examples)
    assert [answers[each.key][0][0].text for each in examples] == [r["output"] for r in rows]
    write_jsonl(theirs, rows[1:])
    with pytest.raises(DataError, match=r"no answer for 1 of 20 instructions, e\.g\. 'What are"):
        task.baseline_answers(examples)


@pytest.mark.usefixtures("no_hub")
def test_outputs_of_another_model_beside_the_instructions_are_not_the_baselines(
    alpaca: Path, tmp_path: Path
) -> None:
    """The first AlpacaEval's file of instructions comes with the answers of text_davinci_003."""
    rows = json_rows(alpaca / REFERENCE)[:5]
    task = make_task(
        "alpaca_eval2",
        {
            "data": str(write_jsonl(tmp_path / "data.jsonl", rows)),
            "calibration": str(alpaca),
        },
    )
    examples = task.examples()
    assert [example.fields["dataset"] for example in examples] == ["helpful_base"] * 5
    assert len(task.baseline_answers(examples)) == 5
    write_jsonl(tmp_path / "data.jsonl", [{**r, "generator": "text_davinci_003"} for r in rows])
    with pytest.raises(ConfigError, match=r"baseline_data=PATH"):
        task.baseline_answers(examples)


def test_prompts_of_ones_own_are_pointed_to_win_rate(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "Hello"}])
    with pytest.raises(ConfigError, match="use the task win_rate"):
        make_task("alpaca_eval2", {"data": str(data)}).examples()


def test_an_evaluation_runs_whole_with_a_judge_that_sends_log_probs(
    alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge gives the baseline's answers 3 to 1, whatever the order: win rate 25."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    rows = sorted(json_rows(alpaca / REFERENCE), key=lambda row: len(row["instruction"]))[:6]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    model = write_chat_model(tmp_path / "model")

    def answer(body: dict[str, Any]) -> Reply:
        assert body["logprobs"] is True and body["max_tokens"] == 1
        text = body["messages"][-1]["content"]
        row = next(row for row in rows if f"<request>\n{row['instruction']}\n</request>" in text)
        baseline_first = f'<answer name="m">\n{row["output"]}\n</answer>' in text
        names = ["m", "M"] if baseline_first else ["M", "m"]
        top = dict(zip(names, (math.log(0.75), math.log(0.25)), strict=True))
        return Reply(names[0], top_logprobs=top)

    with chat_server(answer) as server:
        arguments = [
            *("eval", str(model), "--tasks", "alpaca_eval2", "--output", str(tmp_path / "out")),
            f"judge.base_url={server.base_url}",
            "judge.model=judge",
            f"tasks.alpaca_eval2.data={data}",
            f"tasks.alpaca_eval2.calibration={alpaca}",
            "tasks.alpaca_eval2.max_new_tokens=8",
        ]
        assert main(arguments) == 0
        assert len(server.requests) == 6
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["alpaca_eval2"]
    assert entry["metrics"]["win_rate"]["value"] == pytest.approx(25.0)
    assert 0 < entry["metrics"]["length_controlled_winrate"]["value"] < 100
    assert entry["counts"]["n_wins_base"] == 6 and entry["counts"]["n_instructions_missing"] == 799
    assert entry["template"]["origin"] == "prefopt" and entry["baseline"] == "published"
    assert not any("baseline gpt4" in note for note in entry["notes"])
    wins = [
        row["values"]["win_rate"]
        for row in read_jsonl(tmp_path / "out/alpaca_eval2/examples.jsonl")
    ]
    assert wins == pytest.approx([0.25] * 6)
