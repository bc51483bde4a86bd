"""Draws of weighted samples: which rows, how often, in how many steps, and that a draw is a function of its
step."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefopt.data.groups import GroupList
from prefopt.errors import ConfigError, DataError
from prefopt.model.micro_batches import SplitLimits
from prefopt.recipe.registry import bind_objective
from prefopt.recipe.schema import DataSection, SamplingSection
from prefopt.training.draws import (
    RowDraw,
    build_draw,
    check_labels,
    label_statistics,
    row_gradients,
)
from prefopt.training.metrics import read_metrics
from prefopt.training.regimes import OfflineRegime
from prefopt.types import Group, Response
from tests.unit.memory_trainer import make_trainer, random_pairs, trained_weights

A_LOL = bind_objective({"name": "a_lol_ref_free"})
LIMITS = SplitLimits(max_tokens=1000)


def samples(
    *advantages: float | None, rewards: tuple[float, ...] | None = None, seed: int = 0
) -> GroupList:
    """Single responses of ragged lengths."""
    found = []
    for index, (pair, advantage) in enumerate(
        zip(random_pairs(len(advantages), seed), advantages, strict=True)
    ):
        score = None if rewards is None else rewards[index]
        response = Response(pair.responses[0].ids, score, advantage=advantage)
        found.append(Group(f"row-{index}", pair.prompt_ids, (response,)))
    return GroupList(found)


def regime(source: GroupList, draw: RowDraw | None, **settings: Any) -> OfflineRegime:
    values = {"global_batch_size": 4, "limits": LIMITS, "seed": 1, **settings}
    return OfflineRegime(source, draw=draw, **values)


def draw_of(source: GroupList, objective: Any = A_LOL, **section: Any) -> RowDraw:
    draw = build_draw(SamplingSection(**section), objective, source)
    assert draw is not None
    return draw


def test_priority_draws_rows_in_proportion_to_their_positive_advantage() -> None:
    """4,000 draws of rows with A = 1, 3, -2, 0, 6: shares 0.1, 0.3, 0, 0, 0.6, each within 4 standard errors."""
    source = samples(1.0, 3.0, -2.0, 0.0, 6.0)
    found = regime(source, draw_of(source, name="advantage"), num_epochs=1000)
    counts = Counter(row for step in range(1000) for row in found.rows(step))
    assert set(counts) == {0, 1, 4}
    for row, share in ((0, 0.1), (1, 0.3), (4, 0.6)):
        assert abs(counts[row] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_without_replacement_no_row_is_twice_in_a_step_and_order_is_that_of_successive_draws() -> (
    None
):
    """The first of two draws from A = 1, 2 and 3 is ∝ A, the second ∝ A of what is left, summed by hand:
    P(row 0 is drawn) = 1/6 + 2/6·1/4 + 3/6·1/3 = 5/12."""
    source = samples(1.0, 2.0, 3.0, -1.0)
    draw = draw_of(source, name="advantage", replacement=False)
    steps = [draw.draw(0, step, 2) for step in range(3000)]
    assert all(len(set(rows)) == 2 and 3 not in rows for rows in steps)
    share = sum(0 in rows for rows in steps) / 3000
    assert abs(share - 5 / 12) < 4 * np.sqrt(5 / 12 * 7 / 12 / 3000)


def test_positive_without_replacement_is_a_pass_over_the_positive_rows() -> None:
    source = samples(*[(-1.0) ** i for i in range(20)])
    found = regime(source, draw_of(source, name="positive", replacement=False), num_epochs=2)
    assert found.num_steps == 6  # 10 rows in batches of 4, twice
    for epoch in (0, 1):
        rows = [row for step in range(3 * epoch, 3 * epoch + 3) for row in found.rows(step)]
        assert sorted(rows) == list(range(0, 20, 2))
    assert found.rows(0) != found.rows(3)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_epochs": 1}, 2),  # 8 of 20 rows, in batches of 4
        ({"num_epochs": 3}, 6),
        ({"max_steps": 100}, 40),
        ({"max_steps": 1}, 1),
    ],
)
def test_steps_are_scaled_to_the_positive_share(settings: dict[str, Any], steps: int) -> None:
    source = samples(*[1.0] * 8, *[-1.0] * 12)
    draw = draw_of(source, name="advantage")
    assert regime(source, draw, **settings).num_steps == steps
    assert "8 of 20 rows can be drawn (40.0%)" in draw.summary(steps)
    assert str(steps) in draw.summary(steps)


def test_unscaled_steps_are_those_of_all_rows() -> None:
    source = samples(*[1.0] * 8, *[-1.0] * 12)
    draw = draw_of(source, name="advantage", scale_steps=False)
    assert regime(source, draw, num_epochs=1).num_steps == 5
    assert regime(source, draw, max_steps=100).num_steps == 100


def test_rewards_draw_where_they_are_above_zero() -> None:
    source = samples(None, None, None, rewards=(1.0, -5.0, 3.0))
    draw = draw_of(source, bind_objective({"name": "wbc"}), name="reward")
    assert draw.rows.tolist() == [0, 2]
    assert draw.weights is not None and draw.weights.tolist() == [1.0, 3.0]


def test_positive_rows_of_a_filter_are_those_at_its_threshold() -> None:
    source = samples(None, None, None, None, rewards=(0.5, 0.2, -1.0, 0.3))
    objective = bind_objective({"name": "filtered_nll", "threshold": 0.3})
    assert draw_of(source, objective, name="positive").rows.tolist() == [0, 3]
    assert build_draw(SamplingSection(), objective, source) is None


def test_gradients_a_row_are_those_of_the_objective() -> None:
    """a_lol_kl: A - β where A > 0; direct_advantage: A/β, both signs; r_gold at π = e^-1: R e^-1."""
    source = samples(2.0, -1.0, 0.0, rewards=(0.5, -2.0, 0.0))
    kl = bind_objective({"name": "a_lol_kl", "beta": 0.5})
    np.testing.assert_allclose(row_gradients(kl, source), [1.5, 0, 0])
    direct = bind_objective({"name": "direct_advantage", "beta": 0.5})
    np.testing.assert_allclose(row_gradients(direct, source), [4, -2, 0])
    gold = bind_objective({"name": "r_gold"})
    expected = np.exp(-1) * np.array([0.5, -2, 0])
    np.testing.assert_allclose(row_gradients(gold, source), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "source", "section", "message"),
    [
        (
            {"name": "a_lol"},
            samples(-1.0, -0.25, 0.0 - 3),
            {},
            "objective 'a_lol': learns from none of 3 training rows, since no advantage is above 0 "
            "(the highest: -0.25, row row-1)",
        ),
        (
            {"name": "filtered_nll", "threshold": 5.0},
            samples(None, None, rewards=(1.0, 4.5)),
            {},
            "objective 'filtered_nll' with threshold = 5.0: learns from none of 2 training rows, since no "
            "reward is enough for a weight (the highest: 4.5, row row-1)",
        ),
        (
            {"name": "rwr"},
            samples(None, None, rewards=(-1.0, -0.5)),
            {"name": "reward"},
            "data.sampling.name = 'reward': draws none of 2 rows, since no reward is above 0 "
            "(the highest: -0.5, row row-1)",
        ),
        (
            {"name": "wbc"},
            samples(None, None, rewards=(-1.0, -0.5)),
            {"name": "positive"},
            "data.sampling.name = 'positive': draws none of 2 rows, since no reward is above 0 "
            "(the highest: -0.5, row row-1)",
        ),
    ],
    ids=["all negative", "threshold", "draw", "positive"],
)
def test_nothing_to_learn_from_is_said_with_the_best_there_is(
    objective: dict[str, Any], source: GroupList, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        build_draw(SamplingSection(**section), bind_objective(objective), source)
    assert str(caught.value) == message


def test_negative_rewards_as_weights_are_warned_of_unless_they_are_not_drawn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, wbc = samples(None, None, rewards=(1.0, -2.0)), bind_objective({"name": "wbc"})
    with caplog.at_level(logging.WARNING, "prefopt"):
        check_labels(DataSection(sampling=SamplingSection(name="reward")), wbc, source)
        assert not caplog.text
        check_labels(DataSection(), wbc, source)
    assert "1 of 2 training rows have a negative reward" in caplog.text


def test_statistics_of_the_labels() -> None:
    found = label_statistics(samples(1.0, -1.0, None, -3.0, rewards=(0.0, 2.0, 4.0, 6.0)))
    assert found["rewards"] == {"min": 0, "max": 6, "mean": 3, "std": np.sqrt(5), "rows": 4}
    assert found["advantages"]["negative_frac"] == pytest.approx(2 / 3)  # of those that have one


def test_another_draw_is_another_order() -> None:
    source = samples(1.0, 2.0, -1.0)
    draws = [None, *(draw_of(source, name=n) for n in ("positive", "advantage"))]
    draws.append(draw_of(source, name="advantage", replacement=False))
    hashes = {regime(source, draw).order_hash for draw in draws}
    assert len(hashes) == 4
    first = regime(source, draws[1])
    with pytest.raises(ConfigError, match=r"another data.seed, data.sampling"):
        first.load_state_dict(regime(source, draws[2]).state_dict())


def test_a_row_that_is_drawn_twice_counts_twice() -> None:
    source = samples(1.0, -1.0)
    found = regime(source, draw_of(source, name="advantage"), max_steps=2)
    window = found.window(0)
    assert found.rows(0) == [0, 0, 0, 0]
    assert (window.num_samples, window.num_pairs) == (4, 0)
    assert window.num_sample_tokens == 4 * len(source.group(0).responses[0].ids)
    assert sum(len(batch.groups) for batch in window.micro_batches) == 4


@pytest.mark.parametrize("draw", ["advantage", "uniform"])
def test_a_run_that_was_stopped_ends_where_one_in_one_piece_does(draw: str, tmp_path: Path) -> None:
    """Drawn rows, reference and the rest, bit for bit."""
    source = samples(*np.random.default_rng(0).normal(size=24).tolist())
    settings = {"objective": {"name": "a_lol"}, "max_steps": 16, "sampling": {"name": draw}}
    settings |= {"lr_scheduler": "constant", "warmup_frac": 0.0}
    whole = make_trainer(tmp_path / "whole", source, **settings)
    whole.train()
    parts = make_trainer(tmp_path / "parts", source, save_every=1, **settings)
    steps = parts.regime.num_steps
    parts.regime.num_steps = 3
    parts.train()
    again = make_trainer(tmp_path / "parts", source, **settings)
    again.train(resume_from=tmp_path / "parts" / "checkpoints" / "step-3")
    assert again.regime.step == steps == whole.regime.num_steps
    for (name, left), right in zip(
        trained_weights(again).items(), trained_weights(whole).values(), strict=True
    ):
        assert torch.equal(left, right), name
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    assert rows[0][-1]["loss/total"] == rows[1][-1]["loss/total"]


def test_micro_batches_and_layouts_of_samples_give_one_step(tmp_path: Path) -> None:
    source = samples(*np.random.default_rng(0).normal(size=8).tolist())
    losses = []
    for index, settings in enumerate(
        [{}, {"micro_batch_size": 3}, {"layout": "padded", "micro_batch_size": 1}]
    ):
        trainer = make_trainer(
            tmp_path / str(index), source, objective={"name": "a_lol_seq"}, max_steps=3, **settings
        )
        trainer.train()
        rows = read_metrics(tmp_path / str(index) / "metrics.jsonl")
        losses.append([(row["loss/total"], row["train/grad_norm"]) for row in rows])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_the_few_of_a_step_are_the_first_of_a_whole_sort(size: int) -> None:
    """Efraimidis and Spirakis' keys, all sorted: the same rows in the same order as taking out the few first."""
    weights = np.random.default_rng(3).random(50) + 0.01
    draw = RowDraw("advantage", np.arange(50) * 2, 100, weights, replacement=False)
    keys = np.random.default_rng([5, 9, 0x5A]).exponential(size=50) / weights
    assert draw.draw(5, 9, size) == (np.argsort(keys)[:size] * 2).tolist()
