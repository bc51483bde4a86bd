"""Objectives on weighted samples: values derived by hand, limits, and gradients only where the papers have them.

No row of the toy batch comes from a policy: it is what a data set of rewards and advantages looks like to a loss.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prefopt.credit.base import GroupScores
from prefopt.recipe.registry import Need, get_credit, get_objective
from prefopt.training.reduction import reduced
from prefopt.training.windows import Window
from prefopt.types import ResponseLogps
from tests.unit.objective_cases import (
    WEIGHTED,
    call,
    gradient,
    per_sample,
    random_batch,
)

GOES_BY_ADVANTAGE = [n for n in WEIGHTED if Need.ADVANTAGES in get_objective(n).needs]
SUMS = [name for name in WEIGHTED if name not in ("filtered_nll", "reward_conditioned")]


def toy_samples() -> ResponseLogps:
    """Three samples, and a row that does not count.

    | row | log π               | ρ_t = π / π_ref | NLL | ρ   | R    | A   |
    |-----|---------------------|-----------------|-----|-----|------|-----|
    | 0   | -1    -0.5          | 1.5   1.2       | 1.5 | 1.8 | 0.8  | 0.5 |
    | 1   | -2                  | 0.5             | 2   | 0.5 | 0.2  | 2   |
    | 2   | -0.5  -0.25  -0.25  | 2     0.05   1  | 1   | 0.1 | -0.5 | -1  |
    | 3   | -1                  | 1               |     |     |      |     |
    """
    mask = torch.arange(3) < torch.tensor([2, 1, 3, 1])[:, None]
    policy = torch.tensor([[-1, -0.5, 0], [-2, 0, 0], [-0.5, -0.25, -0.25], [-1, 0, 0]])
    ratio = torch.tensor([[1.5, 1.2, 1], [0.5, 1, 1], [2, 0.05, 1], [1, 1, 1]])
    return ResponseLogps(
        policy=policy,
        mask=mask,
        pairs=torch.empty(0, 2, dtype=torch.long),
        reference=torch.where(mask, policy - ratio.log(), 0.0),
        rewards=torch.tensor([0.8, 0.2, -0.5, float("nan")]),
        advantages=torch.tensor([0.5, 2.0, -1.0, 0.0]),
        samples=torch.tensor([True, True, True, False]),
    )


Three = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """What an objective must return on `toy_samples` for rows 0, 1 and 2; 0 on row 3."""

    losses: Three
    values: dict[str, Any] = field(default_factory=dict)
    weights: Three | None = None
    metrics: dict[str, Three] = field(default_factory=dict)


RATIO = {"ratio/mean": (1.6, 0.5, 0.4), "ratio/clipped_frac": (1.0, 0.0, 1.0)}
REFERENCE_VALUES: dict[str, list[Row]] = {
    # clip [0.4, 1.6]: 0.5·1.6·1.5, 2·0.5·2; A < 0
    "a_lol": [Row((1.2, 2.0, 0.0), {"epsilon": 0.6}, (0.8, 1.0, 0.0), RATIO)],
    "a_lol_ref_free": [Row((0.75, 4.0, 0.0), {}, (0.5, 2.0, 0.0))],
    # clip [0.6, 1.4]: 0.5 (1.4·1 + 1.2·0.5), 2 (0.6·2)
    "a_lol_seq": [
        Row(
            (1.0, 2.4, 0.0),
            {"epsilon": 0.4},
            (0.5, 2.0, 0.0),
            {"ratio/mean": (1.3, 0.6, 1.0), "ratio/clipped_frac": (0.5, 1.0, 2 / 3)},
        )
    ],
    # NLL_ref - NLL = log ρ: 0.75 + 0.1 log 1.8, 4 + 0.1 log 0.5
    "a_lol_kl": [Row((0.8087787, 3.9306853, 0.0), {"beta": 0.1}, (0.5, 2.0, 0.0))],
    # 0.8·1.6·1.5, 0.2·0.5·2, -0.5·0.4·1
    "r_lol": [Row((1.92, 0.2, -0.2), {"epsilon": 0.6}, (1.28, 0.1, -0.2), RATIO)],
    "wbc": [Row((1.2, 0.4, -0.5), {}, (0.8, 0.2, -0.5))],
    # π_t: e^-1 = 0.3678794, e^-0.5 = 0.6065307; e^-2 = 0.1353353; e^-0.5, e^-0.25 = 0.7788008 twice
    # 0.8 (0.3678794 + 0.3032653), 0.2·0.1353353·2, -0.5 (0.3032653 + 2·0.1947002)
    "r_gold": [
        Row(
            (0.5369158, 0.0541341, -0.3463329),
            {"min_weight": 0.1},
            (0.8, 0.2, -0.5),
            {
                "ratio/mean": (0.4872051, 0.1353353, 0.7213774),
                "ratio/clipped_frac": (0.0, 0.0, 0.0),
            },
        ),
        # 0.8 (0.5 + 0.3032653), 0.2·0.5·2
        Row(
            (0.6426123, 0.2, -0.3463329),
            {"min_weight": 0.5},
            (0.8, 0.2, -0.5),
            {"ratio/mean": (0.5532653, 0.5, 0.7213774), "ratio/clipped_frac": (0.5, 1.0, 0.0)},
        ),
    ],
    # a sample at the threshold is kept
    "filtered_nll": [Row((1.5, 2.0, 0.0), {"threshold": 0.2}, (1.0, 1.0, 0.0))],
    "rwr": [
        # e^1.6 = 4.9530324, e^0.4 = 1.4918247, e^-1 = 0.3678794; the first clipped at 3
        Row(
            (4.5, 2.9836494, 0.3678794),
            {"beta": 0.5, "max_weight": 3.0},
            (3.0, 1.4918247, 0.3678794),
            {"weights/clipped_frac": (1.0, 0.0, 0.0)},
        ),
        Row(
            (7.4295486, 2.9836494, 0.3678794),
            {"beta": 0.5, "max_weight": 20.0},
            (4.9530324, 1.4918247, 0.3678794),
            {"weights/clipped_frac": (0.0, 0.0, 0.0)},
        ),
    ],
    "reward_conditioned": [Row((1.5, 2.0, 1.0))],
    # targets 1, 4, -2 against log 1.8 = 0.5877867, log 0.5 = -0.6931472, log 0.1 = -2.3025851
    "direct_advantage": [
        Row(
            (0.0849599, 11.0128153, 0.0457789),
            {"beta": 0.5},
            metrics={"log_ratio/target": (1.0, 4.0, -2.0)},
        )
    ],
}
ROWS = [
    pytest.param(name, row, id=f"{name}-{index}")
    for name, rows in REFERENCE_VALUES.items()
    for index, row in enumerate(rows)
]


def on_rows(values: Three) -> Tensor:
    return torch.tensor([*values, 0.0])


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_weighted_objective_has_reference_values_for_every_hyper_parameter(name: str) -> None:
    covered = {key for row in REFERENCE_VALUES[name] for key in row.values}
    assert set(get_objective(name).fields) == covered


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_losses_and_metrics_are_those_derived_by_hand(name: str, row: Row) -> None:
    output = call(name, toy_samples(), **row.values)
    # The derivations carry seven digits.
    assert_close(per_sample(output), on_rows(row.losses), rtol=0, atol=2e-6)
    expected = {key: on_rows(value) for key, value in row.metrics.items()}
    if row.weights is not None:
        weights = on_rows(row.weights)
        expected |= {"weights/mean": weights, "weights/square": weights**2}
        expected |= {"weights/positive_frac": (weights > 0).float()}
    assert_close(dict(output.sample_metrics), expected, rtol=0, atol=2e-6)
    assert output.losses.numel() == 0 and output.token_losses is None


@pytest.mark.parametrize("name", WEIGHTED)
def test_sums_are_per_response_and_plain_likelihoods_per_token(name: str) -> None:
    """A-LoL's code sums over tokens and means over responses; SFT code means over tokens."""
    output = call(name, toy_samples())
    assert (output.sample_losses is not None) == (name in SUMS)
    assert (output.sample_token_losses is not None) == (name not in SUMS)


# What stands before each token's ∇ log π, by hand: rows 0, 1, 2.
GRADIENTS: list[tuple[str, dict[str, Any], list[list[float]]]] = [
    ("a_lol", {"epsilon": 0.6}, [[-0.8, -0.8, 0], [-1, 0, 0], [0, 0, 0]]),
    ("a_lol_ref_free", {}, [[-0.5, -0.5, 0], [-2, 0, 0], [0, 0, 0]]),
    ("a_lol_seq", {"epsilon": 0.4}, [[-0.7, -0.6, 0], [-1.2, 0, 0], [0, 0, 0]]),
    # A - β, and nothing where A is not positive
    ("a_lol_kl", {"beta": 0.1}, [[-0.4, -0.4, 0], [-1.9, 0, 0], [0, 0, 0]]),
    ("r_lol", {"epsilon": 0.6}, [[-1.28, -1.28, 0], [-0.1, 0, 0], [0.2, 0.2, 0.2]]),
    ("wbc", {}, [[-0.8, -0.8, 0], [-0.2, 0, 0], [0.5, 0.5, 0.5]]),
    (
        "r_gold",
        {"min_weight": 0.5},
        [[-0.4, -0.4852245, 0], [-0.1, 0, 0], [0.3032653, 0.3894004, 0.3894004]],
    ),
    ("filtered_nll", {"threshold": 0.2}, [[-1, -1, 0], [-1, 0, 0], [0, 0, 0]]),
    (
        "rwr",
        {"beta": 0.5, "max_weight": 3.0},
        [[-3, -3, 0], [-1.4918247, 0, 0], [-0.3678794] * 3],
    ),
    ("reward_conditioned", {}, [[-1, -1, 0], [-1, 0, 0], [-1, -1, -1]]),
    # -(A/β - Σ log ρ), on every token
    (
        "direct_advantage",
        {"beta": 0.5},
        [[-0.4122133, -0.4122133, 0], [-4.6931472, 0, 0], [-0.3025851] * 3],
    ),
]


@pytest.mark.parametrize(
    ("name", "values", "expected"), GRADIENTS, ids=[case[0] for case in GRADIENTS]
)
def test_gradients_are_only_where_the_paper_has_them(
    name: str, values: dict[str, Any], expected: list[list[float]]
) -> None:
    """Through log π alone: a ratio, a probability or a reward that weighs a token is a number.

    Were ρ not stopped, a_lol's row 1 (inside the clip) would have A ρ (NLL - 1) beside it.
    """
    step = gradient(name, toy_samples(), **values)
    assert_close(step, torch.tensor([*expected, [0.0] * 3]), rtol=0, atol=2e-6)


def test_every_gradient_is_covered() -> None:
    assert {case[0] for case in GRADIENTS} == set(WEIGHTED)


def at_the_reference(lp: ResponseLogps) -> ResponseLogps:
    return dataclasses.replace(lp, reference=lp.policy)


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a_lol", "a_lol_seq"])
def test_where_the_ratio_is_one_a_lol_is_the_advantage_weighted_nll(name: str) -> None:
    start = at_the_reference(random_batch())
    expected = call("a_lol_ref_free", start)
    assert_close(per_sample(call(name, start)), per_sample(expected))
    assert_close(gradient(name, start), gradient("a_lol_ref_free", start))


def test_a_wide_clip_is_none() -> None:
    lp = toy_samples()
    weights = call("a_lol", lp, epsilon=1e6).sample_metrics["weights/mean"]
    assert_close(weights, on_rows((0.5 * 1.8, 2 * 0.5, 0.0)))
    assert_close(per_sample(call("a_lol_seq", lp, epsilon=1e6))[1], torch.tensor(2 * 0.5 * 2))  # type: ignore[index]


def test_a_narrow_clip_is_the_advantage_weighted_nll() -> None:
    lp = toy_samples()
    narrow = call("a_lol", lp, epsilon=1e-12)
    assert_close(per_sample(narrow), per_sample(call("a_lol_ref_free", lp)))


def test_a_lol_kl_without_its_term_is_reference_free() -> None:
    lp = random_batch()
    assert_close(
        per_sample(call("a_lol_kl", lp, beta=1e-9)), per_sample(call("a_lol_ref_free", lp))
    )


def test_r_gold_at_its_floor_of_one_is_wbc() -> None:
    lp = random_batch()
    assert_close(per_sample(call("r_gold", lp, min_weight=1.0)), per_sample(call("wbc", lp)))


def test_rewards_in_place_of_advantages_make_r_lol_of_a_lol() -> None:
    lp = toy_samples()
    assert lp.rewards is not None
    same = dataclasses.replace(lp, advantages=lp.rewards.abs(), rewards=lp.rewards.abs())
    assert_close(per_sample(call("r_lol", same)), per_sample(call("a_lol", same)))


def test_rwr_from_hot_to_cold() -> None:
    """β → ∞ weighs all alike; β → 0 keeps the rewards above 0, at the largest weight."""
    lp = toy_samples()
    nll = -torch.where(lp.mask, lp.policy, 0.0).sum(-1)[:3]
    hot, cold = (call("rwr", lp, beta=beta, max_weight=7.0) for beta in (1e6, 1e-3))
    assert_close(hot.sample_losses[:3], nll, rtol=1e-5, atol=0)  # type: ignore[index]
    kept = call("filtered_nll", lp, threshold=1e-9).sample_token_losses
    assert_close(cold.sample_losses, 7.0 * kept)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["filtered_nll", "reward_conditioned"])
def test_without_a_threshold_the_step_is_that_of_nll_on_the_same_responses(name: str) -> None:
    """The two reduce over other counts of the window, and to the same number."""
    samples = toy_samples()
    values = {"threshold": -1e9} if name == "filtered_nll" else {}
    assert samples.samples is not None
    counted = samples.samples.nonzero()[:, 0]
    pairs = dataclasses.replace(samples, pairs=counted[:, None].expand(-1, 2), samples=None)
    window = Window(0, 0.0, (), 3, 6, num_samples=3, num_sample_tokens=6)
    assert_close(
        reduced(call(name, samples, **values), window), reduced(call("nll", pairs), window)
    )
    assert_close(gradient(name, samples, **values), gradient("nll", pairs))


@pytest.mark.parametrize("name", GOES_BY_ADVANTAGE)
def test_equal_rewards_teach_nothing(name: str) -> None:
    """Every credit gives equal scores the advantage 0, and at the reference that has no gradient at all."""
    scores = GroupScores((0.7,) * 3, ((1,), (2,), (3,)), random.Random(0))
    found = get_credit("group_mean").fn(scores, keep_degenerate=True).advantages
    lp = dataclasses.replace(at_the_reference(toy_samples()), advantages=torch.tensor([*found, 0]))
    assert not gradient(name, lp).any()
    # Away from the reference only direct_advantage pulls: back to it.
    away = dataclasses.replace(toy_samples(), advantages=torch.zeros(4))
    assert gradient(name, away).any() == (name == "direct_advantage")


def test_direct_advantage_is_at_rest_where_the_log_ratio_is_the_advantage_over_beta() -> None:
    lp = toy_samples()
    assert lp.reference is not None
    ratios = torch.where(lp.mask, lp.policy - lp.reference, 0.0).sum(-1)
    there = dataclasses.replace(lp, advantages=0.02 * ratios)
    assert_close(per_sample(call("direct_advantage", there, beta=0.02)), torch.zeros(4))


@pytest.mark.parametrize("name", ["a_lol", "r_lol", "a_lol_seq"])
def test_a_policy_far_from_its_reference_has_a_bounded_weight(name: str) -> None:
    """ρ = e^±1000: the clip holds it at 1 ± ε, and nothing overflows on the way."""
    for gap, bound in ((1000.0, 1.9), (-1000.0, 0.1)):
        lp = toy_samples()
        far = dataclasses.replace(lp, reference=torch.where(lp.mask, lp.policy - gap, 0.0))
        step = gradient(name, far, epsilon=0.9)
        label = lp.rewards if name == "r_lol" else lp.advantages
        assert label is not None
        assert_close(step[1, 0], -bound * label[1])
