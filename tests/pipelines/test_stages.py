"""The stages that need no model, against values derived by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.base import Dropped, Place
from data_pipelines.external_order import reordered
from data_pipelines.rows import Row, RowKind, responses_of, with_responses
from data_pipelines.stages.advantage import Advantage
from data_pipelines.stages.filter import Filter
from data_pipelines.stages.mix import Mix
from data_pipelines.stages.order import Order
from data_pipelines.stages.pair import Pair
from prefopt.storage.packed import pack_ids, unpack_ids


class Rows:
    """Input of a `whole` stage, in memory."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def rows(self) -> Any:
        return iter([dict(row) for row in self._rows])


def place(tmp_path: Path, reads: RowKind, rows: list[Row] | None = None, seed: int = 0) -> Place:
    return Place("s", seed, reads, tmp_path / "logs", tmp_path / "scratch", Rows(rows or []))


def group(*scores: float | None, id_: str = "g", **columns: Any) -> Row:
    responses = [
        {"text": f"r{number}"} | ({} if score is None else {"score": score})
        for number, score in enumerate(scores)
    ]
    return {"id": id_, "prompt": "p", "responses": responses, **columns}


def pair(chosen: float, rejected: float, id_: str = "p", **columns: Any) -> Row:
    sides = {
        "chosen": "good",
        "score_chosen": chosen,
        "rejected": "bad",
        "score_rejected": rejected,
    }
    return {"id": id_, "prompt": "p", **sides, **columns}


def process(stage: Any, place: Place, row: Row) -> Any:
    (result,) = stage.open(place).process([row])
    return result


# -- pair ----------------------------------------------------------------------------------------------------


def test_best_against_worst_as_simpo_pairs(tmp_path: Path) -> None:
    """Scores 1, 4, 0, 4: the first 4 (row 1) against the 0 (row 2)."""
    (found,) = process(
        Pair(), place(tmp_path, RowKind.GROUPS), group(1.0, 4.0, 0.0, 4.0, answer="a")
    )
    assert found == {
        "id": "g", "prompt": "p", "chosen": "r1", "score_chosen": 4.0, "rejected": "r2",
        "score_rejected": 0.0, "answer": "a",
    }  # fmt: skip


def test_unscored_responses_are_left_out_and_said(tmp_path: Path) -> None:
    (found,) = process(Pair(), place(tmp_path, RowKind.GROUPS), group(None, 2.0, 1.0))
    assert found["num_unscored"] == 1 and (found["chosen"], found["rejected"]) == ("r1", "r2")
    dropped = process(Pair(), place(tmp_path, RowKind.GROUPS), group(None, 2.0))
    assert dropped == Dropped("fewer_than_two_scored", "1 of 2")


def test_every_pair_of_a_group_has_an_id_of_its_own(tmp_path: Path) -> None:
    """Right × wrong of 1, 0, 1: (0, 1) and (2, 1)."""
    stage = Pair(rule={"name": "all_pairs"})
    found = process(stage, place(tmp_path, RowKind.GROUPS), group(1.0, 0.0, 1.0))
    assert [(row["id"], row["chosen"], row["rejected"]) for row in found] == [
        ("g#0", "r0", "r1"),
        ("g#1", "r2", "r1"),
    ]


def test_what_is_known_of_a_response_travels_and_its_token_ids_do_not(tmp_path: Path) -> None:
    row = group(1.0, 0.0)
    row["responses"][0] |= {"model": "m", "ids": pack_ids([1, 2]), "scores": {"rm": 1.0}}
    (found,) = process(Pair(), place(tmp_path, RowKind.GROUPS), row)
    assert found["info_chosen"] == {"model": "m", "scores": {"rm": 1.0}}
    assert "info_rejected" not in found


def test_the_longest_is_rejected_by_tokens_where_they_are_known(tmp_path: Path) -> None:
    """Row 1 has more characters, row 2 more tokens."""
    row = group(3.0, 1.0, 2.0)
    for response, (text, tokens) in zip(
        row["responses"], [("x", 1), ("yyyy", 2), ("zz", 3)], strict=True
    ):
        response |= {"text": text, "tokens": tokens}
    stage = Pair(rule={"name": "best_worst", "reject_longest": True})
    (found,) = process(stage, place(tmp_path, RowKind.GROUPS), row)
    assert found["rejected"] == "zz"
    for response in row["responses"]:
        del response["tokens"]
    (found,) = process(stage, place(tmp_path, RowKind.GROUPS), row)
    assert found["rejected"] == "yyyy"


def test_equal_texts_make_no_pair(tmp_path: Path) -> None:
    row = group(1.0, 0.0)
    row["responses"][1]["text"] = row["responses"][0]["text"]
    assert process(Pair(), place(tmp_path, RowKind.GROUPS), row) == Dropped("duplicate")


def test_sides_and_responses_are_two_views_of_one_row() -> None:
    row = pair(2.0, 1.0, info_chosen={"model": "m"}, extra=1)
    sides = responses_of(row, RowKind.PAIRS)
    assert sides == [{"text": "good", "model": "m", "score": 2.0}, {"text": "bad", "score": 1.0}]
    assert with_responses(row, RowKind.PAIRS, sides) == row
    assert unpack_ids(pack_ids([0, 7, 151_000])) == (0, 7, 151_000)


# -- filter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "row", "reason"),
    [
        ({"drop_ties": True}, pair(1.0, 1.0), "tie"),
        ({"drop_ties": True}, pair(1.0, 0.9), None),
        ({"drop_negative_margins": True}, pair(0.0, 1.0), "negative_margin"),
        ({"drop_negative_margins": True}, pair(1.0, 1.0), None),
        ({"min_margin": 0.5}, pair(1.0, 0.6), "margin_below"),
        ({"min_margin": 0.5}, pair(1.0, 0.5), None),
        ({"max_margin": 2.0}, pair(3.0, 0.5), "margin_above"),
        ({"min_margin": 0.5}, {"id": "p", "prompt": "p", "chosen": "a", "rejected": "b"}, "no_scores"),
        ({"drop_duplicate_sides": True}, pair(1.0, 0.0) | {"rejected": " good\n"}, "duplicate_sides"),
        ({"max_length_gap": 1}, pair(1.0, 0.0) | {"chosen": "goods"}, "length_gap"),
        ({"max_length_ratio": 1.3}, pair(1.0, 0.0), "length_ratio"),
        ({"max_length_ratio": 1.34}, pair(1.0, 0.0), None),
        ({"min_chars": 4}, pair(1.0, 0.0), "chars_below"),
        ({"max_chars": 3}, pair(1.0, 0.0), "chars_above"),
        ({"max_prompt_chars": 3}, pair(1.0, 0.0) | {"prompt": "long"}, "prompt_chars_above"),
        ({"where": {"quality": (8.0, None)}}, pair(1.0, 0.0, quality=7), "quality_below"),
        ({"where": {"quality": (8.0, None)}}, pair(1.0, 0.0), "no_quality"),
        ({"where": {"info_chosen.s": (None, 1.0)}}, pair(1, 0, info_chosen={"s": 2}), "info_chosen.s_above"),
        ({"max_unended_frac": 0.4}, pair(1.0, 0.0, info_rejected={"ended": False}), "unended"),
        ({"max_unended_frac": 0.5}, pair(1.0, 0.0, info_rejected={"ended": False}), None),
    ],
)  # fmt: skip
def test_filter_of_pairs(
    tmp_path: Path, settings: dict[str, Any], row: Row, reason: str | None
) -> None:
    result = process(Filter(**settings), place(tmp_path, RowKind.PAIRS), row)
    assert (result.reason if isinstance(result, Dropped) else None) == reason
    assert reason is not None or result == row


@pytest.mark.parametrize(
    ("settings", "row", "reason"),
    [
        # arXiv:2505.13261 keeps [0.084, 0.87] of the samples right: 1 of 12 is out, 1 of 8 and 6 of 8 are in
        ({"accuracy_band": (0.084, 0.87)}, group(1.0, *[0.0] * 11), "too_hard"),
        ({"accuracy_band": (0.084, 0.87)}, group(1.0, *[0.0] * 7), None),
        ({"accuracy_band": (0.084, 0.87)}, group(*[1.0] * 6, 0.0, 0.0), None),
        ({"accuracy_band": (0.084, 0.87)}, group(*[1.0] * 8), "too_easy"),
        ({"accuracy_band": (0.5, 0.5), "right_above": 3.0}, group(4.0, 3.0), None),
        ({"accuracy_band": (0.5, 1.0)}, group(None, 1.0), None),
        ({"accuracy_band": (0.5, 1.0)}, group(None, None), "no_scores"),
        ({"min_responses": 3}, group(1.0, 0.0), "too_few_responses"),
    ],
)
def test_filter_of_groups(
    tmp_path: Path, settings: dict[str, Any], row: Row, reason: str | None
) -> None:
    result = process(Filter(**settings), place(tmp_path, RowKind.GROUPS), row)
    assert (result.reason if isinstance(result, Dropped) else None) == reason


def test_equal_responses_are_dropped_as_simpo_does(tmp_path: Path) -> None:
    row = group(1.0, 0.0)
    assert process(Filter(drop_all_equal=True), place(tmp_path, RowKind.GROUPS), row) == row
    row["responses"][1]["text"] = "r0"
    result = process(Filter(drop_all_equal=True), place(tmp_path, RowKind.GROUPS), row)
    assert result == Dropped("all_equal")


# -- order ---------------------------------------------------------------------------------------------------


def ordered(
    tmp_path: Path, stage: Order, rows: list[Row], kind: RowKind = RowKind.PAIRS
) -> tuple[list[str], list[Any]]:
    found = list(stage.run(place(tmp_path, kind, rows)))
    return (
        [row["id"] for row in found if isinstance(row, dict)],
        [(each.id, each.reason) for each in found if isinstance(each, Dropped)],
    )


def test_order_by_margin_is_stable_and_keeps_the_first_share(tmp_path: Path) -> None:
    """Margins 1, 3, 2, 3 and one without scores: b, d (equal, as they came), c, a; 0.5 of four rows is two."""
    rows = [pair(1, 0, "a"), pair(3, 0, "b"), pair(2, 0, "c"), pair(4, 1, "d")]
    rows.append({"id": "e", "prompt": "p", "chosen": "x", "rejected": "y"})
    assert ordered(tmp_path, Order(), rows) == (["b", "d", "c", "a"], [("e", "no_margin")])
    kept, dropped = ordered(tmp_path, Order(keep_frac=0.5), rows)
    assert kept == ["b", "d"]
    assert sorted(dropped) == [
        ("a", "beyond_keep_frac"),
        ("c", "beyond_keep_frac"),
        ("e", "no_margin"),
    ]
    assert ordered(tmp_path, Order(descending=False), rows)[0] == ["a", "c", "b", "d"]


def test_balance_rate_adds_normalised_gaps(tmp_path: Path) -> None:
    """α = 0.5. Margins 0, 5, 10 become 0, 0.5, 1; gaps 4, 8, 0 become 0.5, 1, 0: sums 0.25, 0.75, 0.5."""
    rows = [
        pair(m, 0, id_, info_chosen={"lp": gap}, info_rejected={"lp": 0.0})
        for id_, m, gap in (("a", 0, 4.0), ("b", 5, 8.0), ("c", 10, 0.0))
    ]
    stage = Order(by={"margin": 0.5, "gap.lp": 0.5})
    assert ordered(tmp_path, stage, rows)[0] == ["b", "c", "a"]
    # SeRA's ensemble is of raw margins: 0.9 · margin + 0.1 · gap = 0.4, 5.3, 9
    stage = Order(by={"margin": 0.9, "gap.lp": 0.1}, normalise="none")
    assert ordered(tmp_path, stage, rows)[0] == ["c", "b", "a"]


def test_order_by_difficulty_takes_the_share_of_right_responses(tmp_path: Path) -> None:
    rows = [group(1, 0, id_="half"), group(1, 1, id_="easy"), group(0, 0, id_="hard")]
    assert ordered(tmp_path, Order(by={"accuracy": 1.0}), rows, RowKind.GROUPS)[0] == [
        "easy",
        "half",
        "hard",
    ]


def test_random_order_depends_on_the_seed_and_not_on_what_else_is_there(tmp_path: Path) -> None:
    rows = [pair(1, 0, f"r{n}") for n in range(50)]
    stage = Order(by={"random": 1.0})
    first, _ = ordered(tmp_path, stage, rows)
    assert first != [row["id"] for row in rows] and sorted(first) == sorted(
        row["id"] for row in rows
    )
    fewer, _ = ordered(tmp_path, stage, rows[::2])
    assert fewer == [id_ for id_ in first if int(id_[1:]) % 2 == 0]


def test_reordering_on_disk_is_sorting(tmp_path: Path) -> None:
    """More rows than one bucket holds, some left out, against numpy's permutation."""
    rng = np.random.default_rng(0)
    ranks = np.full(45_000, -1, dtype=np.int64)
    kept = rng.permutation(45_000)[:41_000]
    ranks[kept] = rng.permutation(41_000)
    rows = ({"n": n, "text": "a\nb\u2028c"} for n in range(45_000))
    found = [row["n"] for row in reordered(rows, ranks, tmp_path / "scratch")]
    expected = np.empty(41_000, dtype=np.int64)
    expected[ranks[kept]] = kept
    assert found == expected.tolist()
    assert not (tmp_path / "scratch").exists()


# -- mix -----------------------------------------------------------------------------------------------------


def source_file(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps(pair(1, 0, f"o{n}")) + "\n" for n in range(count)))
    return str(path)


def mixed(tmp_path: Path, sources: list[dict[str, Any]], own: int = 30, seed: int = 0) -> list[Any]:
    rows = [pair(1, 0, f"n{n}") for n in range(own)]
    return list(Mix(sources=sources).run(place(tmp_path, RowKind.PAIRS, rows, seed)))


def test_a_source_makes_up_its_share(tmp_path: Path) -> None:
    """30 rows are three tenths, so 70 of the source's 90 are drawn and 20 are not."""
    path = source_file(tmp_path / "old.jsonl", 90)
    found = mixed(tmp_path, [{"path": path, "share": 0.7, "name": "old"}])
    rows = [each for each in found if isinstance(each, dict)]
    assert [row["source"] for row in rows].count("old") == 70
    assert [row["source"] for row in rows].count("new") == 30
    assert len({row["id"] for row in rows}) == 100
    dropped = [each.id for each in found if isinstance(each, Dropped)]
    assert len(dropped) == 20 and {f"old/o{n}" for n in range(90)} == set(dropped) | {
        row["id"] for row in rows if row["source"] == "old"
    }
    halves = [row["source"] for row in rows[:50]].count("old")
    assert 25 < halves < 45  # shuffled: 35 expected
    assert mixed(tmp_path, [{"path": path, "share": 0.7, "name": "old"}]) == found
    assert mixed(tmp_path, [{"path": path, "share": 0.7, "name": "old"}], seed=1) != found


def test_too_few_rows_are_an_error_unless_they_may_repeat(tmp_path: Path) -> None:
    from prefopt.errors import DataError

    path = source_file(tmp_path / "old.jsonl", 40)
    with pytest.raises(DataError, match=r"has 40 rows, and share = 0.7 needs 70.*repeat: true"):
        mixed(tmp_path, [{"path": path, "share": 0.7}])
    found = mixed(tmp_path, [{"path": path, "share": 0.7, "name": "old", "repeat": True}])
    ids = [row["id"] for row in found if row["source"] == "old"]
    assert len(ids) == len(set(ids)) == 70
    assert {id_.removesuffix("~2") for id_ in ids} == {f"old/o{n}" for n in range(40)}


def test_a_source_of_another_kind_is_refused_with_file_and_line(tmp_path: Path) -> None:
    from prefopt.errors import DataError

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "p"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:1: no column 'chosen'"):
        mixed(tmp_path, [{"path": str(path), "share": 0.5}])


# -- advantage -----------------------------------------------------------------------------------------------


def test_advantages_are_scores_minus_their_groups_mean(tmp_path: Path) -> None:
    """Rewards 1, 0, 0.5: mean 0.5."""
    found = process(Advantage(), place(tmp_path, RowKind.GROUPS), group(1.0, 0.0, 0.5, answer="a"))
    assert [(row["id"], row["response"], row["reward"], row["advantage"]) for row in found] == [
        ("g#0", "r0", 1.0, 0.5),
        ("g#1", "r1", 0.0, -0.5),
        ("g#2", "r2", 0.5, 0.0),
    ]
    assert all(row["answer"] == "a" for row in found)
    assert process(Advantage(), place(tmp_path, RowKind.GROUPS), group(1.0, 1.0)) == Dropped("tie")


def test_a_sample_says_whether_its_response_ended_where_that_is_known(tmp_path: Path) -> None:
    row = group(1.0, 0.0)
    row["responses"][0]["ended"] = False
    cut, other = process(Advantage(), place(tmp_path, RowKind.GROUPS), row)
    assert cut["ended"] is False and "ended" not in other


def test_advantages_against_a_value_keep_the_positive_ones(tmp_path: Path) -> None:
    """A-LoL: A = R - V(x), trained on where A > 0. Rewards 1 and 0.2 against 0.3: 0.7 and -0.1."""
    stage = Advantage(value="v", positive_only=True)
    good, bad = process(stage, place(tmp_path, RowKind.PAIRS), pair(1.0, 0.2, v=0.3))
    assert (good["response"], good["advantage"]) == ("good", pytest.approx(0.7))
    assert good["value"] == 0.3
    assert bad == Dropped("negative_advantage", "-0.1", "p#1")
    assert process(stage, place(tmp_path, RowKind.PAIRS), pair(0.3, 0.2, v=0.3)) == [
        Dropped("zero_advantage", "0", "p#0"),
        Dropped("negative_advantage", "-0.1", "p#1"),
    ]
    assert process(stage, place(tmp_path, RowKind.PAIRS), pair(0.3, 0.2)) == Dropped("no_value")
