"""Objectives against values derived by hand, their limiting cases, and their hyper-parameter schema.

Objectives that train on samples have theirs in test_sample_objectives.py. Every row below is worked out from
the table in `toy_batch` with s(x) = log(1 + e^x) = -log σ(-x):

    s(-1) = 0.3132617   s(1) = 1.3132617   s(-0.75) = 0.3868710   s(0.75) = 1.1368710
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from prefopt.recipe.entries import parameters
from prefopt.recipe.registry import OBJECTIVES, get_objective
from tests.unit.objective_cases import (
    NAMES,
    ON_SAMPLES,
    REQUIRED,
    call,
    gradient,
    random_batch,
    toy_batch,
    unreduced,
)

Pair = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """What an objective must return on `toy_batch`, for pairs A and B."""

    losses: Pair
    values: dict[str, float] = field(default_factory=dict)
    chosen: Pair | None = None
    """``rewards/chosen``; None where the objective has no rewards."""
    rejected: Pair | None = None
    token_losses: Pair | None = None
    metrics: dict[str, Pair] = field(default_factory=dict)
    """Further metrics, besides those every objective has."""


# β ρ at β = 0.5 of chosen (A, B) and rejected (A, B): the rewards of every reference-based objective on sums.
HALF = {"chosen": (0.5, -0.25), "rejected": (-0.5, 0.5)}

REFERENCE_VALUES: dict[str, list[Row]] = {
    "dpo": [
        # β h = (1, -0.75): s(-1), s(0.75)
        Row((0.3132617, 1.1368710), {"beta": 0.5}, **HALF),
        # 0.8 s(-1) + 0.2 s(1) = 0.2506094 + 0.2626523; 0.8 s(0.75) + 0.2 s(-0.75) = 0.9094968 + 0.0773742
        Row((0.5132617, 0.9868710), {"beta": 0.5, "label_smoothing": 0.2}, **HALF),
        # 0.5 · 2 nats and 0.5 · 1 nat of chosen tokens
        Row(
            (0.3132617, 1.1368710),
            {"beta": 0.5, "nll_weight": 0.5},
            token_losses=(1.0, 0.5),
            **HALF,
        ),
    ],
    "robust_dpo": [
        # [0.8 s(-1) - 0.2 s(1)] / 0.6 = -0.0120429 / 0.6; [0.8 s(0.75) - 0.2 s(-0.75)] / 0.6 = 0.8321226/0.6
        Row((-0.0200716, 1.3868710), {"beta": 0.5, "label_smoothing": 0.2}, **HALF),
    ],
    "ld_dpo": [
        # A, l = 2: chosen 0.5 + 0 + 0.5·0.5 = 0.75, rejected -1; β · 1.75 = 0.875, s(-0.875)
        # B, l = 1: chosen -0.5, rejected 0.5 + 0.5·(0.25 + 0.25) = 0.75; β · -1.25 = -0.625, s(0.625)
        Row(
            (0.3484446, 1.0537007),
            {"beta": 0.5, "alpha": 0.5},
            chosen=(0.375, -0.25),
            rejected=(-0.5, 0.375),
        ),
    ],
    "ld_dpo_policy_only": [
        # A, l = 2: chosen -1 - 0.5 + 0.5·(-0.5) - (-3) = 1.25, rejected -1; β · 2.25 = 1.125, s(-1.125)
        # B, l = 1: chosen -0.5, rejected -0.5 + 0.5·(-0.25 - 0.75) - (-2.5) = 1.5; β · -2 = -1, s(1)
        Row(
            (0.2811501, 1.3132617),
            {"beta": 0.5, "alpha": 0.5},
            chosen=(0.625, -0.25),
            rejected=(-0.5, 0.75),
        ),
    ],
    "dpop": [
        # A: chosen rose, no penalty: s(-1). B: λ max(0, 0.5) = 1, β (-1.5 - 1) = -1.25: s(1.25)
        Row(
            (0.3132617, 1.5019291),
            {"beta": 0.5, "dpop_lambda": 2.0},
            metrics={"rewards/penalty": (0.0, 0.5)},
            **HALF,
        ),
    ],
    "ipo": [
        # target 1/(2·0.25) = 2: (2 - 2)², (-1.5 - 2)²
        Row((0.0, 12.25), {"beta": 0.25}, chosen=(0.25, -0.125), rejected=(-0.25, 0.25)),
    ],
    "ipo_mean": [
        # target 1: A 1/3 + 1/2 - 1 = -1/6; B -1/2 - 1/3 - 1 = -11/6
        Row(
            (0.0277778, 3.3611111),
            {"beta": 0.5},
            chosen=(0.1666667, -0.25),
            rejected=(-0.25, 0.1666667),
        ),
    ],
    "hinge": [
        # 1 - 0.25·2, 1 + 0.25·1.5
        Row((0.5, 1.375), {"beta": 0.25}, chosen=(0.25, -0.125), rejected=(-0.25, 0.25)),
        # β h = 2 is beyond the target margin of 1: no loss
        Row((0.0, 2.5), {"beta": 1.0}, chosen=(1.0, -0.5), rejected=(-1.0, 1.0)),
    ],
    "apo_zero": [
        # σ(-0.5) + σ(-0.5) = 2 · 0.3775407; σ(0.25) + σ(0.5) = 0.5621765 + 0.6224593
        Row((0.7550813, 1.1846358), {"beta": 0.5}, **HALF),
    ],
    "apo_down": [
        # σ(0.5) + σ(-1) = 0.6224593 + 0.2689414; σ(-0.25) + σ(0.75) = 0.4378235 + 0.6791787
        Row((0.8914008, 1.1170022), {"beta": 0.5}, **HALF),
    ],
    "simpo": [
        # A: 2 (-2/3 + 3/2) - 0.5 = 7/6, s(-7/6); B: 2 (-1 + 1/2) - 0.5 = -1.5, s(1.5)
        Row(
            (0.2710977, 1.7014133),
            {"beta": 2.0, "gamma": 0.5},
            chosen=(-1.3333333, -2.0),
            rejected=(-3.0, -1.0),
        ),
        # 0.9 s(-7/6) + 0.1 s(7/6) = 0.2439880 + 0.1437764; 0.9 s(1.5) + 0.1 s(-1.5) = 1.5312720 + 0.0201413
        Row(
            (0.3877644, 1.5514133),
            {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1, "nll_weight": 2.0},
            chosen=(-1.3333333, -2.0),
            rejected=(-3.0, -1.0),
            token_losses=(4.0, 2.0),
        ),
    ],
    "cpo": [
        # 0.5 (-2 + 3) = 0.5, s(-0.5); 0.5 (-1 + 1.5) = 0.25, s(-0.25); NLL of 2 and 1 nats at weight 1
        Row(
            (0.4740770, 0.5759394),
            {"beta": 0.5},
            chosen=(-1.0, -0.5),
            rejected=(-1.5, -0.75),
            token_losses=(2.0, 1.0),
        ),
        # 0.8 s(-0.5) + 0.2 s(0.5) = 0.3792616 + 0.1948154; 0.8 s(-0.25) + 0.2 s(0.25) = 0.4607515 + 0.1651879
        Row(
            (0.5740770, 0.6259394),
            {"beta": 0.5, "label_smoothing": 0.2, "nll_weight": 0.0},
            chosen=(-1.0, -0.5),
            rejected=(-1.5, -0.75),
        ),
    ],
    "orpo": [
        # odds p/(1-p) of p = e^mean: e^(-2/3) 1.0551483, e^-1.5 0.2872169, e^-1 0.5819767, e^-0.5 1.5414941
        # -log σ(log(o_w/o_l)) = log(1 + o_l/o_w): A log 1.2722052, B log 3.6487212; times β = 0.5
        Row(
            (0.1203759, 0.6471884),
            {"beta": 0.5},
            chosen=(-0.3333333, -0.5),
            rejected=(-0.75, -0.25),
            token_losses=(2.0, 1.0),
        ),
    ],
    "nll": [Row((0.0, 0.0), token_losses=(2.0, 1.0))],
    "sopo": [
        # A's rejected response scores 0.2 < 0.5: s(-1). B's scores 0.8 and is left out: s(0.25)
        Row(
            (0.3132617, 0.8259394),
            {"beta": 0.5, "threshold": 0.5},
            metrics={"pairs/rejected_used_frac": (1.0, 0.0)},
            **HALF,
        ),
        # both in: s(-1), s(0.75)
        Row(
            (0.3132617, 1.1368710),
            {"beta": 0.5, "threshold": 0.81},
            metrics={"pairs/rejected_used_frac": (1.0, 1.0)},
            **HALF,
        ),
        # B's reward is at the threshold, not below it. β_w = 1: A 1 + 0.5 = 1.5, s(-1.5); B -0.5, s(0.5)
        Row(
            (0.2014133, 0.9740770),
            {"beta": 0.5, "threshold": 0.8, "chosen_weight": 2.0},
            chosen=(1.0, -0.5),
            rejected=(-0.5, 0.5),
            metrics={"pairs/rejected_used_frac": (1.0, 0.0)},
        ),
    ],
}

ROWS = [
    pytest.param(name, row, id=f"{name}-{index}")
    for name, rows in REFERENCE_VALUES.items()
    for index, row in enumerate(rows)
]


def test_every_objective_has_reference_values_and_every_value_an_objective() -> None:
    """The others' values are in test_sample_objectives.py, which says the same."""
    assert set(REFERENCE_VALUES) == set(OBJECTIVES) - set(ON_SAMPLES)
    assert all(REFERENCE_VALUES.values())


@pytest.mark.parametrize("name", REFERENCE_VALUES)
def test_every_hyper_parameter_has_a_reference_value(name: str) -> None:
    """Besides ``nll_weight``, one term in one place, which dpo's, simpo's and cpo's rows pin down."""
    covered = {key for row in REFERENCE_VALUES[name] for key in row.values}
    assert set(get_objective(name).fields) - covered <= {"nll_weight"}


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_losses_are_those_derived_by_hand(name: str, row: Row) -> None:
    output = call(name, toy_batch(), **row.values)
    # The derivations carry seven digits.
    assert_close(output.losses, torch.tensor(row.losses), rtol=0, atol=2e-7 * 16)
    if row.token_losses is None:
        assert output.token_losses is None
    else:
        assert output.token_losses is not None
        assert_close(output.token_losses, torch.tensor(row.token_losses))


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_metrics_are_those_derived_by_hand(name: str, row: Row) -> None:
    expected = {key: torch.tensor(value) for key, value in row.metrics.items()}
    if row.chosen is not None and row.rejected is not None:
        chosen, rejected = torch.tensor(row.chosen), torch.tensor(row.rejected)
        expected |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
        expected |= {"rewards/margin": chosen - rejected}
        expected |= {"rewards/accuracy": (chosen > rejected).float()}
    if row.token_losses is not None:
        # 2 nats over 3 tokens, 1 nat over 1 token: the weight is not in the metric
        expected |= {"nll/chosen": torch.tensor([2 / 3, 1.0])}
    metrics = dict(call(name, toy_batch(), **row.values).metrics)
    assert_close(metrics, expected, rtol=0, atol=1e-6)


# What one objective becomes where a hyper-parameter reaches its limit: (name, values, name, values).
LIMITS = [
    ("ld_dpo", {"beta": 0.3, "alpha": 1.0}, "dpo", {"beta": 0.3}),
    ("ld_dpo_policy_only", {"beta": 0.3, "alpha": 1.0}, "dpo", {"beta": 0.3}),
    ("dpop", {"beta": 0.3, "dpop_lambda": 0.0}, "dpo", {"beta": 0.3}),
    ("robust_dpo", {"beta": 0.3, "label_smoothing": 0.0}, "dpo", {"beta": 0.3}),
    ("cpo", {"nll_weight": 1.0, "beta": 1e-9}, "nll", {}),
    ("sopo", {"beta": 0.3, "threshold": 1e9}, "dpo", {"beta": 0.3}),
    ("hypo", {"beta": 0.3, "kl_weight": 0.0}, "dpo", {"beta": 0.3}),
]


@pytest.mark.parametrize(("name", "values", "limit", "limit_values"), LIMITS)
def test_a_variant_at_its_limit_is_what_it_varies(
    name: str, values: dict[str, float], limit: str, limit_values: dict[str, float]
) -> None:
    batch = random_batch()
    variant, base = call(name, batch, **values), call(limit, batch, **limit_values)
    shift = variant.losses - base.losses  # constant where the limit drops a term without gradient
    assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-6)
    assert_close(variant.token_losses, base.token_losses)
    if limit == "dpo":
        assert_close(variant.losses, base.losses)


def test_dpo_with_labels_that_say_nothing_is_symmetric_in_the_pair() -> None:
    batch = random_batch()
    swapped = dataclasses.replace(batch, pairs=batch.pairs.flip(-1))
    values = {"beta": 0.5, "label_smoothing": 0.5 - 1e-7}
    assert_close(call("dpo", batch, **values).losses, call("dpo", swapped, **values).losses)


def test_cdpo_has_its_minimum_where_the_model_believes_the_label_noise() -> None:
    """dL/dm = 0 at σ(m) = 1-ε; with one-token responses and a uniform reference, m = log π_w - log π_l."""
    margin = torch.logit(torch.tensor(0.8))
    policy = torch.stack([margin - 5, torch.tensor(-5.0)])[:, None].requires_grad_()
    batch = dataclasses.replace(
        random_batch(),
        policy=policy,
        reference=torch.full((2, 1), -4.0),
        mask=torch.ones(2, 1, dtype=torch.bool),
        pairs=torch.tensor([[0, 1]]),
    )
    call("dpo", batch, beta=1.0, label_smoothing=0.2).losses.sum().backward()
    assert_close(policy.grad, torch.zeros(2, 1), rtol=0, atol=1e-6)


def test_simpo_gamma_is_an_absolute_margin() -> None:
    """-log σ(β u - γ) with β u = γ is log 2, whatever β: γ is not divided by it."""
    batch = toy_batch()  # u_A = 5/6
    for beta in (1.0, 2.0, 10.0):
        losses = call("simpo", batch, beta=beta, gamma=beta * 5 / 6).losses
        assert_close(losses[0], torch.tensor(2.0).log())


def test_ld_dpo_starts_at_zero_margin_and_its_policy_only_variant_does_not() -> None:
    """At policy = reference: margins 0, and β (1-α) times the excess log-prob of the longer response.

    A: the chosen response is longer by one token of -0.5: +0.5·0.5·0.5. B: the rejected one by two tokens of
    -1 together: -0.5·0.5·1.
    """
    start = dataclasses.replace(toy_batch(), reference=toy_batch().policy)
    values = {"beta": 0.5, "alpha": 0.5}
    both = call("ld_dpo", start, **values).metrics["rewards/margin"]
    policy_only = call("ld_dpo_policy_only", start, **values).metrics["rewards/margin"]
    assert_close(both, torch.zeros(2))
    assert_close(policy_only, torch.tensor([0.125, -0.25]))


def test_common_length_is_worked_out_per_pair_not_per_row() -> None:
    """A response of 3 tokens against one of 2 and one of 1: with α = 0 it counts 2 tokens, then 1."""
    batch = dataclasses.replace(toy_batch(), pairs=torch.tensor([[0, 1], [0, 3]]))
    rewards = call("ld_dpo", batch, beta=1.0, alpha=0.0).metrics["rewards/chosen"]
    assert_close(rewards, torch.tensor([0.5 + 0.0, 0.5]))


def test_a_tie_counts_as_half_right() -> None:
    """Policy = reference, as at step 0: the model has no opinion, which is chance and not 0 % right."""
    start = dataclasses.replace(toy_batch(), reference=toy_batch().policy)
    assert_close(call("dpo", start).metrics["rewards/accuracy"], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("logp", [0.0, -1e-8, -1e-6, -0.5, -30.0, -500.0, -1e4])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_orpo_stays_finite_from_certainty_to_the_impossible(logp: float, side: str) -> None:
    """p = 1 has infinite odds, and e^-500 is 0 in fp32: neither may give NaN, forward or backward."""
    rows = [logp, -1.0] if side == "chosen" else [-1.0, logp]
    policy = torch.tensor(rows)[:, None].requires_grad_()
    mask, pairs = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[0, 1]])
    batch = dataclasses.replace(random_batch(), policy=policy, mask=mask, pairs=pairs)
    losses = call("orpo", batch).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("logp", [-1e-5, -1e-3, -0.1, -0.69, -0.7, -3.0, -15.0, -40.0, -300.0])
def test_orpo_in_fp32_is_as_good_as_fp64(logp: float) -> None:
    """At β = 1 and log p_l = -log 2 (odds of 1), L = log(1 + (1-p)/p) = -log p: exactly the NLL."""
    policy = torch.tensor([[logp], [-math.log(2)]])
    mask, pairs = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[0, 1]])
    batch = dataclasses.replace(random_batch(), policy=policy, mask=mask, pairs=pairs)
    assert_close(call("orpo", batch, beta=1.0).losses, -policy[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["policy", "reference", "behavior"])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_losses_and_gradients_stay_finite_at_extreme_log_probs(
    name: str, side: str, scale: float
) -> None:
    """Log-ratios of tens of thousands of nats, as a diverging run has them: no infinity, no NaN."""
    batch = random_batch()
    extreme = dataclasses.replace(batch, **{side: getattr(batch, side) * scale})
    values = {"beta": 0.1} if "beta" in get_objective(name).fields else {}
    assert unreduced(call(name, extreme, **values)).isfinite().all()
    assert gradient(name, extreme, **values).isfinite().all()


OUT_OF_BOUNDS = {
    "beta": [0.0, -0.1, float("inf"), float("nan")],
    "label_smoothing": [-0.1, 0.5],
    "alpha": [-0.1, 1.1],
    "gamma": [-0.1, float("inf")],
    "dpop_lambda": [-1.0],
    "nll_weight": [-0.5, float("nan")],
    "epsilon_low": [0.0, -0.1, float("inf")],
    "epsilon_high": [0.0, -0.1, float("inf")],
    "max_tokens": [0, -1, 1.5],
    "kl_weight": [-0.1, float("nan")],
    "threshold": [float("inf"), float("nan")],
    "epsilon": [0.0, -0.1, float("inf")],
    "min_weight": [-0.1, 1.1],
    "max_weight": [0.0, -1.0, float("inf")],
    "chosen_weight": [0.0, -1.0, float("inf")],
}
ZERO_IS_OFF = {(name, key) for name in NAMES for key in get_objective(name).needs_when}
"""A weight whose term, and need, is switched off by 0."""


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_out_of_bounds_are_refused(name: str) -> None:
    schema = parameters(get_objective(name))
    for key in get_objective(name).fields:
        for value in [*OUT_OF_BOUNDS[key], "0.1", True]:
            if value == 0.0 and (name, key) in ZERO_IS_OFF:
                continue
            with pytest.raises(ValidationError, match=key):
                schema(**REQUIRED.get(name, {}) | {key: value})


def test_a_whole_number_is_accepted_for_a_real_one() -> None:
    assert parameters(get_objective("simpo"))(beta=2, gamma=1).model_dump() == {
        "beta": 2.0,
        "gamma": 1.0,
        "label_smoothing": 0.0,
        "nll_weight": 0.0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_cites_its_source_and_documents_its_hyper_parameters(name: str) -> None:
    spec = get_objective(name)
    docstring = spec.fn.__doc__ or ""
    assert spec.source
    assert "Source:" in docstring
    for key in spec.fields:
        assert f"{key}: " in docstring
