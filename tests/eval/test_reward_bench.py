"""RewardBench's section arithmetic against the published rows and the official constants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.models import open_models
from eval.registry import make_task
from eval.score import score_file
from eval.settings import EvalSettings
from eval.tasks.reward_bench import NUM_EXAMPLES, SECTIONS
from prefopt.errors import DataError
from prefopt.recipe.schema import ModelSection
from tests.eval.runs import write_chat_model, write_jsonl


@pytest.fixture(scope="session")
def meta(shared_data: Path) -> Path:
    return shared_data / "rewardbench_meta" / "rewardbench_v1.json"


def score(path: Path) -> dict[str, Any]:
    return score_file("reward_bench", path, {})


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
    return path


def subset_accuracies() -> dict[str, float]:
    """A different fraction for each subset."""
    return {subset: 0.5 + 0.02 * place for place, subset in enumerate(NUM_EXAMPLES)}


def test_constants_are_the_official_ones(meta: Path) -> None:
    official = json.loads(meta.read_text())
    weights = {subset: n for subsets in SECTIONS.values() for subset, n in subsets.items()}
    assert weights == official["EXAMPLE_COUNTS"]
    mapping = {name: list(subsets) for name, subsets in SECTIONS.items()}
    assert mapping == official["SUBSET_MAPPING"]
    assert sum(NUM_EXAMPLES.values()) == 2985  # the filtered set


def test_published_rows_give_the_leaderboards_score(meta: Path) -> None:
    """Within rounding of the sections: Cohere's published 88.2 is 88.27 from its own sections."""
    models = score(meta)["models"]
    for row in json.loads(meta.read_text())["published"]:
        found = models[row["model"]]
        assert found["score"] == pytest.approx(row["recomputed"], abs=0.005)
        assert found["score"] == pytest.approx(row["published_score"], abs=0.1)
        four = (row["Chat"] + row["Chat_Hard"] + row["Safety"] + row["Reasoning"]) / 4
        assert found["score_4_sections"] == pytest.approx(four)
        assert found["prior_sets"] == pytest.approx(row["Prior_Sets"])


def test_a_models_subset_accuracies_are_weighted_with_math_as_heavy_as_code(tmp_path: Path) -> None:
    """AI2's file of one model, indented over many lines, with fields that are no accuracies."""
    given = subset_accuracies()
    record = {"model": "m", "model_type": "Seq. Classifier", "chat_template": "tulu", **given}
    found = score(write_json(tmp_path / "m.json", record))
    code = sum(accuracy for subset, accuracy in given.items() if subset.startswith("hep-")) / 6
    assert found["model"] == "m"
    assert found["reasoning"] == pytest.approx(100 * (given["math-prm"] + code) / 2)
    chat = [("alpacaeval-easy", 100), ("alpacaeval-length", 95), ("alpacaeval-hard", 95)]
    chat += [("mt-bench-easy", 28), ("mt-bench-med", 40)]
    expected = sum(given[subset] * n for subset, n in chat) / 358
    assert found["chat"] == pytest.approx(100 * expected)
    names = ("chat", "chat_hard", "safety", "reasoning")
    assert found["score"] == pytest.approx(sum(found[name] for name in names) / 4)


def test_examples_give_their_subsets_accuracy_and_a_tie_is_wrong(tmp_path: Path) -> None:
    """Subsets of one accuracy but unequal size: 3 of 4 right in each, one of the wrong ones a tie."""
    margins = (1.0, 0.5, 2.0, 0.0)
    rows = [
        {"id": n, "subset": subset, "scores_chosen": [1.0 + margin], "scores_rejected": [1.0]}
        for subset in NUM_EXAMPLES
        for n, margin in enumerate(margins)
    ]
    found = score(write_jsonl(tmp_path / "r.jsonl", rows))
    assert found["score"] == found["chat"] == pytest.approx(75)
    assert found["n"] == 92 and found["groups"]["donotanswer"] == {"accuracy": 75, "n": 4}
    assert any("donotanswer 4 of 136" in note for note in found["notes"])


def test_columns_of_one_object_are_read_as_rows(tmp_path: Path) -> None:
    """AI2's eval-set-scores: results of 0 and 1, a column each."""
    subsets = [subset for subset in NUM_EXAMPLES for _ in range(2)]
    record = {
        "model": "m",
        "id": list(range(len(subsets))),
        "subset": subsets,
        "results": [1, 0] * len(NUM_EXAMPLES),
    }
    found = score(write_json(tmp_path / "m.json", record))
    assert (found["model"], found["n"], found["score"]) == ("m", 46, 50)
    with pytest.raises(DataError, match="different lengths"):
        score(write_json(tmp_path / "n.json", {**record, "results": [1]}))


def test_the_standard_error_is_that_of_repeated_draws(tmp_path: Path) -> None:
    """Accuracies drawn anew 4,000 times from binomials scatter by what one file says."""
    given = subset_accuracies()
    found = score(write_json(tmp_path / "m.json", {"model": "m", **given}))
    random = np.random.default_rng(0)
    total = np.zeros(4000)
    for weights in SECTIONS.values():
        for subset, weight in weights.items():
            n = NUM_EXAMPLES[subset]
            drawn = random.binomial(n, given[subset], 4000) / n
            total += 25 * weight / sum(weights.values()) * drawn
    assert found["score_standard_error"] == pytest.approx(total.std(), rel=0.05)


def test_a_section_that_lacks_a_subset_has_no_number_and_says_so(tmp_path: Path) -> None:
    given = {"model": "m", **subset_accuracies()}
    del given["hep-go"]
    found = score(write_json(tmp_path / "m.json", given))
    assert found["score"] is None and found["reasoning"] is None and found["chat"] > 0
    assert "Reasoning has no number: it lacks hep-go" in found["notes"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"model": "m", "Chat": 101.0}], "Chat = 101.0: must be a percentage"),
        ([{"model": "m", "hep-go": 93.0}], "hep-go = 93.0: must be a fraction"),
        ([{"model": "m", "Chat": 90.0}] * 2, "r.jsonl:2: a second row of model 'm'"),
        ([{"model": "m", "score": 90.0}], "neither an example"),
        ([{"id": 1, "subset": "hep-go", "results": 1}] * 2, "hep-go/1 comes twice"),
        ([{"id": 1, "subset": "hep-go", "results": 2}], "must be 0 or 1"),
        ([{"id": 1, "subset": "hep-go"}], "neither 'results' nor"),
    ],
)
def test_bad_files_are_refused_with_line_and_column(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        score(write_jsonl(tmp_path / "r.jsonl", rows))


def test_a_missing_score_is_counted(tmp_path: Path) -> None:
    rows = [
        {"id": 0, "subset": "hep-go", "score_chosen": None, "score_rejected": 1.0},
        {"id": 1, "subset": "hep-go", "score_chosen": 2.0, "score_rejected": 1.0},
        {"id": 2, "subset": "unheard-of", "score_chosen": 2.0, "score_rejected": 1.0},
    ]
    found = score(write_jsonl(tmp_path / "r.jsonl", rows))
    assert found["num_missing_score"] == 1
    assert found["groups"]["hep-go"] == {"accuracy": 100, "n": 1}
    assert "in no section: unheard-of" in found["notes"]


@pytest.mark.parametrize(("chat", "format"), [("chatml", "chat"), (None, "text")])
def test_a_policy_is_scored_by_its_log_ratio_to_the_baseline(
    tmp_path: Path, chat: str | None, format: str
) -> None:
    rows = [
        {
            "id": 0,
            "subset": subset,
            "prompt": "What is 1 + 2?",
            "chosen": "3",
            "rejected": "It is 4.",
        }
        for subset in NUM_EXAMPLES
    ]
    rows.append({**rows[0], "id": 1, "chosen": "3 " * 400})
    data = write_jsonl(tmp_path / "rb.jsonl", rows)
    paths = [write_chat_model(tmp_path / str(seed), seed=seed, chat=chat) for seed in (0, 1)]
    found = []
    for policy, baseline in (paths, paths[::-1]):
        task = make_task("reward_bench", {"data": str(data), "format": format})
        settings = EvalSettings(
            model=ModelSection(path=str(policy)),
            baseline=ModelSection(path=str(baseline)),
            device="cpu",
        )
        examples = task.examples()
        opened = task.open(open_models(settings))
        found.append(task.rows(examples, opened))
        task.close(opened)
        summary = task.summarise(found[-1])
        assert summary.counts["num_too_long"] == 1
        assert summary.metrics["score"].value in (0.0, 100.0)
    one, other = (rows[0].values["margin"] or math.nan for rows in found)
    assert one == pytest.approx(-other) and abs(one) > 1e-3  # policy and reference changed places
    assert found[0][0].details == {"by": "implicit_reward", "subset": "alpacaeval-easy"}
