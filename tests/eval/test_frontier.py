"""Checkpoints of a run side by side, and what reward each unit of KL bought."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.base import Metric
from eval.comparison.compare import compare
from eval.comparison.frontier import pareto, root
from prefopt.errors import ConfigError
from tests.eval.result_dirs import A, B, checkpoint, scored


def test_a_directory_of_checkpoints_stands_for_them_by_step(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        checkpoint(tmp_path / "run" / f"step-{step}", [step / 10, step / 9], [step, step + 1.0])
    (tmp_path / "run" / "step-400").mkdir()
    (tmp_path / "run" / "logs").mkdir()
    found = compare([tmp_path / "run"], force=False)
    assert [output.name for output in found.outputs] == ["step-3", "step-20", "step-100"]
    assert [output.step for output in found.outputs] == [3, 20, 100]
    (remark,) = found.remarks
    assert "step-400: left out" in remark


def test_results_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / run / "step-1", A) for run in ("dpo", "simpo")]
    found = compare(outputs, force=False)
    assert [output.name for output in found.outputs] == ["dpo/step-1", "simpo/step-1"]


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.0, 2.0), (4.0, 3.0), (1.0, 1.0)]
    # (3, 2), (2, 2) and (4, 3) cost no less than (2, 3) and gain no more; equal points dominate neither.
    assert pareto(points) == [True, True, False, False, False, True]


def test_frontier_takes_the_reward_that_results_have(tmp_path: Path) -> None:
    for step, reward in ((1, 0.5), (2, 2.0), (3, 1.0)):
        checkpoint(tmp_path / "r" / f"step-{step}", [step, step + 1.0], [reward, reward + 0.1])
        checkpoint(tmp_path / "w" / f"step-{step}", [step, step + 1.0], [reward, 0.9], "win_rate")
    rewards = compare([tmp_path / "r"], force=False).frontier
    wins = compare([tmp_path / "w"], force=False).frontier
    assert rewards is not None and wins is not None
    assert (rewards.reward, wins.reward) == ("signals.reward", "win_rate.win_rate")
    assert [point.on_front for point in rewards.points] == [True, True, False]
    assert [point.kl.value for point in rewards.points] == [1.5, 2.5, 3.5]


def test_frontier_of_a_named_reward(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint(tmp_path / f"step-{step}", [step, step], [step, step])
    named = compare([tmp_path], force=False, reward="kl.kl").frontier
    assert named is not None and named.reward == "kl.kl"
    with pytest.raises(ConfigError, match=r"did you mean 'signals\.reward'"):
        compare([tmp_path], force=False, reward="signal.reward")


def test_there_is_no_frontier_without_a_kl(tmp_path: Path) -> None:
    outputs = [scored(tmp_path / "a", A), scored(tmp_path / "b", B)]
    assert compare(outputs, force=False).frontier is None
    with pytest.raises(ConfigError, match=r"fewer than two results have it and kl\.kl"):
        compare(outputs, force=False, reward="quiz.accuracy")


def test_roots_of_kls_carry_their_intervals_and_never_fail() -> None:
    found = root(Metric(4.0, 1.0))
    assert found.value == 2.0
    assert found.interval == pytest.approx(((4 - 1.95996) ** 0.5, (4 + 1.95996) ** 0.5), rel=1e-5)
    below = root(Metric(-0.01, 0.02))
    assert below.value == 0.0 and below.interval is not None and below.interval[0] == 0.0
