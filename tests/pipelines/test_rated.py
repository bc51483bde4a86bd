"""Published rated data through YAML alone: the counts that the files are known to have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.pipeline import load_pipeline, presets
from data_pipelines.rows import RowKind
from prefopt.cli import main
from tests.eval.runs import write_jsonl
from tests.pipelines.pipelines import build, counts, refused, rows, write_pipeline


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rated(
    tmp_path: Path,
    path: Path,
    *stages: dict[str, Any],
    columns: dict[str, str] | None = None,
    **keys: Any,
) -> Path:
    source = {"path": str(path), **({"columns": columns} if columns else {})}
    first = {"stage": "rated", "sources": [source], **keys}
    return write_pipeline(tmp_path / "p.yaml", [first, *stages], shard_rows=300)


# -- the published sets --------------------------------------------------------------------------------------


def test_ultrafeedback_has_four_identical_pairs_and_111_ties(
    tmp_path: Path, shared_data: Path
) -> None:
    """One of the ties is among the rows with an empty or equal side, which never come as far as the filter."""
    file = shared_data / "ultrafeedback_1k" / "train.jsonl.gz"
    columns = {f"score_{side}": f"metadata.score_{side}" for side in ("chosen", "rejected")}
    path = rated(tmp_path, file, {"stage": "filter", "drop_ties": True}, columns=columns)
    folder = build(path)
    first, last = counts(folder, "rated"), counts(folder, "filter")
    assert first == {
        "rows_in": 1000,
        "rows_out": 994,
        "dropped": {"empty_chosen": 1, "empty_rejected": 1, "identical": 4},
    }
    raw = read(file)
    ties = {
        n
        for n, row in enumerate(raw, 1)
        if row["metadata"]["score_chosen"] == row["metadata"]["score_rejected"]
    }
    assert len(ties) == 111
    listed = (folder / "manifest" / "rated" / "dropped.jsonl").read_text().splitlines()
    gone = {int(json.loads(line)["id"].rsplit(":", 1)[1]) for line in listed}
    assert last["dropped"] == {"tie": len(ties - gone)} == {"tie": 110}
    pair = rows(folder / "filter")[0]
    source = raw[int(pair["id"].rsplit(":", 1)[1]) - 1]
    assert (pair["chosen"], pair["rejected"]) == (source["chosen"], source["rejected"])
    assert pair["score_chosen"] == source["metadata"]["score_chosen"]


def test_hh_transcripts_become_dialogues_and_their_last_turns(
    tmp_path: Path, shared_data: Path
) -> None:
    file = shared_data / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    folder = build(rated(tmp_path, file))
    assert counts(folder, "rated") == {
        "rows_in": 2312,
        "rows_out": 2303,
        "dropped": {"empty_chosen": 4, "prompts_differ": 5},
    }
    raw = read(file)
    for pair in rows(folder / "rated")[::400]:
        source = raw[int(pair["id"].rsplit(":", 1)[1]) - 1]
        turns = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
        names = {"user": "Human", "assistant": "Assistant"}
        text = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
        assert " ".join(text.split()) == " ".join(source["chosen"].split())


def test_hh_rewards_rank_as_published(tmp_path: Path, shared_data: Path) -> None:
    """expected.json: 2,354 rows, 65.85 % ranked right by the reward model, 2 ties."""
    expected = json.loads((shared_data / "hh_rlhf" / "expected.json").read_text())["helpful_base"]
    file = shared_data / "hh_rlhf" / "lol_helpful_base_with_rewards.jsonl.gz"
    columns = {"score_chosen": "reward_chosen", "score_rejected": "reward_rejected"}
    stages = [
        {"stage": "filter", "id": "ties", "drop_ties": True},
        {"stage": "filter", "drop_negative_margins": True},
    ]
    folder = build(rated(tmp_path, file, *stages, columns=columns))
    first, right = counts(folder, "rated"), counts(folder, "filter")
    assert first["rows_in"] == expected["rows"] == 2354
    raw = read(file)
    assert sum(row["reward_chosen"] == row["reward_rejected"] for row in raw) == expected["ties"]
    # The rows that never reach a loss (equal or empty sides) count in the published share: add them back.
    listed = (folder / "manifest" / "rated" / "dropped.jsonl").read_text().splitlines()
    gone = [raw[int(json.loads(line)["id"].rsplit(":", 1)[1]) - 1] for line in listed]
    assert first["dropped"] == {"empty_rejected": 4, "identical": 2} and len(gone) == 6
    won = right["rows_out"] + sum(row["reward_chosen"] > row["reward_rejected"] for row in gone)
    assert won / 2354 == pytest.approx(expected["reward_model_pairwise_accuracy"], abs=1e-9)


def test_sharegpt_pairs_keep_every_row(tmp_path: Path, shared_data: Path) -> None:
    folder = build(rated(tmp_path, shared_data / "sharegpt_demo" / "dpo_en_demo.json.gz"))
    assert counts(folder, "rated") == {"rows_in": 300, "rows_out": 300, "dropped": {}}
    with gzip.open(shared_data / "sharegpt_demo" / "dpo_en_demo.json.gz") as file:
        raw = json.load(file)
    for pair, source in zip(rows(folder / "rated"), raw, strict=True):
        assert pair["chosen"] == source["chosen"]["value"]
        assert [turn["content"] for turn in pair["prompt"]] == [
            t["value"] for t in source["conversations"]
        ]


def test_gsm8k_solutions_pair_the_right_one_with_the_wrong_one(
    tmp_path: Path, shared_data: Path
) -> None:
    """The file's own labels: 286 and 742 right (expected.json); pairs where the two models disagree."""
    expected = json.loads((shared_data / "gsm8k" / "expected.json").read_text())
    file = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    models = ("6b_finetuning", "175b_verification")
    responses = [{"text": f"{m}.solution", "score": f"{m}.is_correct", "model": m} for m in models]
    pair = {"stage": "pair", "rule": {"name": "first_right_wrong"}}
    path = rated(
        tmp_path,
        file,
        pair,
        columns={"prompt": "question"},
        responses=responses,
        keep=["ground_truth"],
    )
    folder = build(path)
    scores = [[each["score"] for each in row["responses"]] for row in rows(folder / "rated")]
    assert [sum(column) for column in zip(*scores, strict=True)] == [
        expected[m]["n_correct"] for m in models
    ]
    labels = [[row[m]["is_correct"] for m in models] for row in read(file)]
    assert counts(folder, "pair") == {
        "rows_in": 1319,
        "rows_out": sum(a != b for a, b in labels),
        "dropped": {
            "all_right": sum(a and b for a, b in labels),
            "all_wrong": sum(not a and not b for a, b in labels),
        },
    }
    for row in rows(folder / "pair"):
        assert row["info_chosen"]["model"] != row["info_rejected"]["model"] and row["ground_truth"]


def test_the_four_solutions_of_a_group_are_scored_by_the_verifier(
    tmp_path: Path, shared_data: Path
) -> None:
    """`final_number` on both models' solutions, against the file's labels: no mismatch in 2,638."""
    file = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    models = ("6b_finetuning", "175b_verification")
    responses = [{"text": f"{m}.solution", "model": m} for m in models]
    score = {"stage": "score", "signals": [{"name": "final_number", "answer": "ground_truth"}]}
    path = rated(
        tmp_path,
        file,
        score,
        columns={"prompt": "question"},
        responses=responses,
        keep=["ground_truth"],
    )
    found = [[each["score"] for each in row["responses"]] for row in rows(build(path) / "score")]
    assert found == [[float(row[m]["is_correct"]) for m in models] for row in read(file)]


# -- shapes and what is wrong with them ----------------------------------------------------------------------


def test_a_list_of_responses_with_scores_and_models(tmp_path: Path) -> None:
    """UltraFeedback with all completions; one without text is left out and said, one without score stays."""
    completions = [
        {"response": "a", "overall_score": 7, "model": "m1"},
        {"response": " ", "overall_score": 1, "model": "m2"},
        {"response": "b", "overall_score": None, "model": "m3"},
    ]
    data = [
        {"instruction": "q", "completions": completions},
        {"instruction": "q2", "completions": completions[:2]},
    ]
    file = write_jsonl(tmp_path / "uf.jsonl", data)
    keys = {"column": "completions", "text": "response", "score": "overall_score", "model": "model"}
    folder = build(rated(tmp_path, file, columns={"prompt": "instruction"}, responses=keys))
    (row,) = rows(folder / "rated")
    assert row["responses"] == [
        {"text": "a", "score": 7.0, "model": "m1"},
        {"text": "b", "model": "m3"},
    ]
    assert row["num_empty"] == 1
    assert counts(folder, "rated")["dropped"] == {"fewer_than_two_responses": 1}


def test_one_response_with_a_score_is_a_weighted_sample(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "answer": "a", "r": 0.5}])
    path = rated(tmp_path, file, responses=[{"text": "answer", "score": "r"}])
    (row,) = rows(build(path) / "rated")
    assert row["responses"] == [{"text": "a", "score": 0.5}]


def test_an_offline_response_is_one_side_of_sopos_pair(tmp_path: Path) -> None:
    """The data's own answer is chosen by decree, against the worst of the others, whatever they score."""
    row = {"q": "p", "gold": "g", "a": "x", "sa": 5.0, "b": "y", "sb": 3.0}
    file = write_jsonl(tmp_path / "r.jsonl", [row])
    responses = [
        {"text": "gold", "score": "sb", "offline": True},
        {"text": "a", "score": "sa"},
        {"text": "b", "score": "sb"},
    ]
    pair = {"stage": "pair", "rule": {"name": "sopo"}}
    path = rated(tmp_path, file, pair, columns={"prompt": "q"}, responses=responses)
    (found,) = rows(build(path) / "pair")
    assert (found["chosen"], found["rejected"]) == ("g", "y")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"p": "q", "list": "text"}, "column 'list' holds no list of responses but str"),
        ({"p": "q", "list": ["a", "b"]}, "each response must be an object"),
        ({"p": "q", "list": [{"t": "a"}]}, "r.jsonl:1, list:0: no column 's'"),
        (
            {"p": "q", "list": [{"t": "a", "s": "good"}]},
            "column 's' = 'good': a score must be a finite number",
        ),
        ({"p": "q", "list": [{"t": 3, "s": 1}]}, "column 't' holds int, and a response is text"),
        ({"p": "q"}, "no column 'list'; it has p"),
    ],
)
def test_responses_of_another_shape_are_named_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], says: str
) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [row])
    keys = {"column": "list", "text": "t", "score": "s"}
    path = rated(tmp_path, file, columns={"prompt": "p"}, responses=keys)
    said = refused(capsys, path, code=1)
    assert says in said and "r.jsonl:1" in said


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"responses": [{"text": "a"}]}, "names fewer than two responses"),
        (
            {"columns": {"chosen": "c"}, "responses": [{"text": "a"}, {"text": "b"}]},
            "columns.chosen: would be ignored",
        ),
        ({"keep": ["prompt"]}, "keep: 'prompt' is a column that stages write"),
        ({"responses": {"text": "a"}}, "column is missing"),
    ],
)
def test_settings_that_cannot_mean_anything_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], says: str
) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p"}])
    assert says in refused(capsys, rated(tmp_path, file, **keys))


# -- presets -------------------------------------------------------------------------------------------------


def local(file: Path, output: Path) -> list[str]:
    return [
        f"stages.rated.sources.0.path={file}",
        "stages.rated.sources.0.split=null",
        f"output_dir={output}",
    ]


def test_the_preset_for_hh_takes_the_published_file(tmp_path: Path, shared_data: Path) -> None:
    file = shared_data / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    assert main(["data", "build", "hh_dialogues", *local(file, tmp_path / "out")]) == 0
    assert counts(tmp_path / "out", "rated")["rows_out"] == 2303


def test_the_preset_for_ultrafeedback_pairs_best_with_worst_a_point_apart(tmp_path: Path) -> None:
    """In the shape of openbmb/UltraFeedback: scores 8, 5, 8, 6 give one pair, 7 and 6.5 none, equal texts none."""

    def row(*answers: tuple[str, float]) -> dict[str, Any]:
        completions = [
            {"model": f"m{n}", "response": t, "overall_score": s}
            for n, (t, s) in enumerate(answers)
        ]
        return {
            "source": "evol_instruct",
            "instruction": "explain",
            "models": [],
            "completions": completions,
        }

    data = [
        row(("a", 8.0), ("b", 5.0), ("c", 8.0), ("d", 6.0)),
        row(("a", 7.0), ("b", 6.5)),
        row(("a", 7.0), ("a", 1.0)),
    ]
    file = write_jsonl(tmp_path / "uf.jsonl", data)
    assert main(["data", "build", "ultrafeedback_completions", *local(file, tmp_path / "out")]) == 0
    (pair,) = rows(tmp_path / "out" / "filter")
    assert (pair["chosen"], pair["rejected"]) == ("a", "b")
    assert pair["prompt"] == [{"role": "user", "content": "explain"}]
    assert pair["info_chosen"] == {"model": "m0"}
    assert counts(tmp_path / "out", "answered")["dropped"] == {"all_equal": 1}
    assert counts(tmp_path / "out", "filter")["dropped"] == {"margin_below": 1}


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_sound_as_shipped(name: str) -> None:
    pipeline = load_pipeline(Path(name))
    assert pipeline.stages[-1].gives is RowKind.PAIRS
    assert pipeline.directory.parts[0] == "data"
