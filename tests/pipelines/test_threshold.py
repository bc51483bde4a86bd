"""ReST's thresholds, by hand on a table of six rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.base import Dropped, Place
from data_pipelines.rows import Row, RowKind
from data_pipelines.stages.threshold import Threshold
from data_pipelines.thresholds import ThresholdRule, thresholds
from prefopt.errors import DataError
from prefopt.recipe.yaml_file import Document
from tests.pipelines.pipelines import build, refused, rows, write_pipeline
from tests.pipelines.test_stages import group, place

GIVEN = str(Path(__file__).with_name("given.py"))
HARD = {"prompt": "hard"}
# Two prompts. Sorted, the rewards of "p" are .1 .5 .7 .9, those of "hard" .2 .4.
TABLE = [group(0.1, 0.5, 0.9, 0.7, id_="a"), {**group(0.2, 0.4, id_="b"), **HARD}]


def run(settings: dict[str, Any], at: Place) -> tuple[list[Row], list[Dropped]]:
    found = list(Threshold(**settings).run(at))
    kept = [each for each in found if isinstance(each, dict)]
    return kept, [each for each in found if isinstance(each, Dropped)]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"above": None}, [0.1, 0.5, 0.9, 0.7, 0.2, 0.4]),
        ({"above": 0.4}, [0.5, 0.9, 0.7]),  # R > τ: 0.4 itself is out
        ({"above": 0.4, "keep_equal": True}, [0.5, 0.9, 0.7, 0.4]),
        # place (4-1)·.5 = 1.5 between .5 and .7: τ = .6; of two, .2 and .4: .3
        ({"percentile": 50}, [0.9, 0.7, 0.4]),
        # place 2.25: .7 + .25·(.9-.7) = .75; place .75: .2 + .75·.2 = .35
        ({"percentile": 75}, [0.9, 0.4]),
        # of .1 .2 .4 .5 .7 .9, place 2.5: .45
        ({"percentile": 50, "over": "all"}, [0.5, 0.9, 0.7]),
        # means .55 and .3
        ({"gamma": 0}, [0.9, 0.7, 0.4]),
        # .5·.9 + .5·.55 = .725; .5·.4 + .5·.3 = .35
        ({"gamma": 0.5}, [0.9, 0.4]),
        # of all: mean 2.8/6, so .5·.9 + .5·.4667 = .6833
        ({"gamma": 0.5, "over": "all"}, [0.9, 0.7]),
        ({"gamma": 1.0, "keep_equal": True}, [0.9, 0.4]),  # the best of each
    ],
)
def test_thresholds_by_hand(tmp_path: Path, settings: dict[str, Any], kept: list[float]) -> None:
    at = place(tmp_path, RowKind.GROUPS, TABLE)
    found, dropped = run(settings, at)
    assert [row["reward"] for row in found] == kept
    assert {each.reason for each in dropped} <= {"below_threshold"}
    report = at.report["threshold"]
    assert (
        (report["samples"], report["kept"]) == (6, len(kept)) == (len(found + dropped), len(kept))
    )
    assert report["prompts_kept"] == len({row["prompt"] for row in found})
    assert report["reward"] == {"mean": 0.466667, "best": 0.9}
    assert report["reward_kept"]["mean"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)


def test_a_rising_threshold_keeps_a_subset() -> None:
    """Of 500 rewards of 40 prompts, with many equal ones, for each rule."""
    draw = np.random.default_rng(0)
    rewards, prompts = draw.integers(0, 12, 500) / 12, draw.integers(0, 40, 500)
    for over_all in (False, True):
        for key, values in (("percentile", (0, 25, 60, 99)), ("gamma", (0, 0.3, 0.9))):
            before = np.full(500, True)
            for value in values:
                rule = ThresholdRule(over_all=over_all, **{key: value})
                now = rewards > thresholds(rewards, prompts, rule)
                assert not (now & ~before).any()
                before = now


def test_equal_rewards_are_never_above_their_mean() -> None:
    """The fp64 mean of ten times 0.1 is 0.09999999999999999, which 0.1 is above."""
    rewards = np.array([0.1] * 3 + [0.7] * 10)
    assert np.array([0.7] * 10).mean() != 0.7 or np.array([0.1] * 3).mean() != 0.1
    for gamma in (0, 0.1, 0.3, 0.7, 1):
        found = thresholds(rewards, np.array([0] * 3 + [1] * 10), ThresholdRule(gamma=gamma))
        assert (found == rewards).all()


def test_samples_stay_as_they_are_and_prompts_are_known_by_their_text(tmp_path: Path) -> None:
    """The four rewards of "p" come as two groups' rows would: apart, with an advantage, in any order."""
    rewards = [("p", 0.1), ("hard", 0.4), ("p", 0.9), ("p", 0.5), ("hard", 0.2), ("p", 0.7)]
    table = [
        {"id": f"{n}", "prompt": prompt, "response": "r", "reward": reward, "advantage": -1.0, "answer": n}
        for n, (prompt, reward) in enumerate(rewards)
    ]  # fmt: skip
    found, _ = run({"percentile": 50}, place(tmp_path, RowKind.SAMPLES, table))
    assert found == [table[1], table[2], table[5]]


def test_rows_of_groups_name_prompt_reward_and_source(tmp_path: Path) -> None:
    row = group(0.2, 0.9, id_="a", answer=4)
    row["responses"] += [{"text": "own", "score": 1.0, "offline": True}, {"text": "no score"}]
    row["responses"][1]["model"] = "sft"
    at = place(tmp_path, RowKind.GROUPS, [row])
    found, dropped = run({"above": 0.5}, at)
    assert found == [
        {"id": "a#1", "prompt": "p", "response": "r1", "reward": 0.9, "source": "sft", "answer": 4},
        {"id": "a#2", "prompt": "p", "response": "own", "reward": 1.0, "source": "data", "answer": 4},
    ]  # fmt: skip
    assert [(each.id, each.reason) for each in dropped] == [
        ("a#0", "below_threshold"),
        ("a#3", "unscored"),
    ]
    assert at.report["threshold"]["kept_of_data"] == 1


def test_at_most_so_many_of_a_prompt_are_kept_drawn_by_the_seed(tmp_path: Path) -> None:
    """30 right answers to one prompt and 3 to another: 10 and 3."""
    samples = [{"id": f"p{n}", "prompt": "p", "response": "r", "reward": 1.0} for n in range(30)]
    samples += [{"id": f"q{n}", "prompt": "q", "response": "r", "reward": 1.0} for n in range(3)]
    samples += [{"id": f"w{n}", "prompt": "p", "response": "w", "reward": 0.0} for n in range(9)]
    settings = {"above": 0.5, "max_per_prompt": 10}
    found, dropped = run(settings, place(tmp_path, RowKind.SAMPLES, samples))
    ids = [row["id"] for row in found]
    assert sum(id_[0] == "p" for id_ in ids) == 10 and sum(id_[0] == "q" for id_ in ids) == 3
    reasons = [each.reason for each in dropped]
    assert reasons.count("beyond_max_per_prompt") == 20 and reasons.count("below_threshold") == 9
    draws = set()
    for seed in range(5):
        again, _ = run(settings, place(tmp_path, RowKind.SAMPLES, samples, seed=seed))
        draws.add(tuple(row["id"] for row in again))
    assert len(draws) == 5 and tuple(ids) in draws


def test_a_threshold_that_keeps_nothing_says_the_best_reward(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"above = 0.95 keeps none of 6 samples: .* up to 0.9, their mean"
    ):
        run({"above": 0.95}, place(tmp_path, RowKind.GROUPS, TABLE))
    same = [group(1.0, 1.0, 1.0)]
    with pytest.raises(
        DataError, match=r"percentile = 90 of each prompt keeps none of 3 .* keep_equal"
    ):
        run({"percentile": 90}, place(tmp_path, RowKind.GROUPS, same))
    with pytest.raises(DataError, match="not one sample has a reward"):
        run({"above": 0}, place(tmp_path, RowKind.GROUPS, [group(None, float("nan"))]))


def test_what_a_threshold_cannot_be() -> None:
    def problems(**settings: Any) -> list[str]:
        return Threshold(**settings).problems(RowKind.GROUPS, Document({}), ("stages", 1))

    assert problems(above=0.5) == problems(above=None) == problems(gamma=0.5, over="all") == []
    assert "needs one of above, percentile, gamma, and has none" in problems(keep_equal=True)[0]
    assert "and has above and gamma" in problems(above=0.1, gamma=0.5)[0]
    assert "threshold.over: would be ignored" in problems(above=0.1, over="all")[0]
    assert "threshold.gamma = null" in problems(gamma=None)[0]


def test_as_a_stage_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and their number are in the sealed record; a second threshold is a stage of its own."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE))
    stages: list[dict[str, Any]] = [
        {"stage": "given", "path": str(tmp_path / "rows.jsonl"), "kind": "groups"},
        {"stage": "threshold", "percentile": 50},
    ]
    folder = build(write_pipeline(tmp_path / "p.yaml", stages, plugins=[GIVEN]))
    assert [row["reward"] for row in rows(folder / "threshold")] == [0.9, 0.7, 0.4]
    record = json.loads((folder / "manifest" / "threshold" / "done.json").read_text())
    assert record["counts"] == {"rows_in": 6, "rows_out": 3, "dropped": {"below_threshold": 3}}
    assert record["report"]["threshold"]["rule"] == "percentile = 50 of each prompt"
    assert record["report"]["threshold"]["threshold"] == {"from": 0.3, "to": 0.6}
    # another threshold over the same rows: what is there is not made again
    stages[1] = {"stage": "threshold", "id": "higher", "percentile": 75}
    build(write_pipeline(tmp_path / "p.yaml", stages, plugins=[GIVEN]))
    assert [row["reward"] for row in rows(folder / "higher")] == [0.9, 0.4]
    stages[1] = {"stage": "threshold", "id": "highest", "above": 0.9}
    said = refused(capsys, write_pipeline(tmp_path / "p.yaml", stages, plugins=[GIVEN]), code=1)
    assert "above = 0.9 keeps none of 6 samples" in said and "up to 0.9" in said
