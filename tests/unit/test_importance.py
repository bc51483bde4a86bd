"""Truncated importance weights of off-policy rollouts, by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.objectives.dpo import dpo
from prefopt.training.importance import log_importance, weighted
from prefopt.types import ObjectiveOutput, ResponseLogps


def batch(policy: Tensor) -> ResponseLogps:
    """Rows 0 and 1 were sampled, row 2 is from a data set; row 1 has one token, its padding holds garbage.

    log π/π_sampler: row 0: 0.1 + 0.2 = 0.3; row 1: -0.5; row 2: none. Pairs (0, 1) and (2, 0).
    """
    behavior = torch.tensor([[-1.1, -2.2], [-0.5, 7.0], [0.0, 0.0]])
    return ResponseLogps(
        policy=policy,
        reference=torch.zeros(3, 2),
        mask=torch.tensor([[True, True], [True, False], [True, True]]),
        pairs=torch.tensor([[0, 1], [2, 0]]),
        behavior=behavior,
        samples=torch.tensor([True, True, False]),
        group=torch.zeros(3, dtype=torch.long),
    )


POLICY = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, -1.0]])


def test_weights_are_ratios_of_whole_responses_and_of_both_sides_of_a_pair() -> None:
    lp = batch(POLICY)
    torch.testing.assert_close(log_importance(lp), torch.tensor([0.3, -0.5, 0.0]))
    ones = ObjectiveOutput(torch.ones(2), token_losses=torch.ones(2), sample_losses=torch.ones(3))
    output, rows = weighted(ones, lp, cap=10.0)
    pairs = torch.tensor([math.exp(0.3 - 0.5), math.exp(0.3)])
    torch.testing.assert_close(output.losses, pairs)
    torch.testing.assert_close(output.token_losses, pairs)
    torch.testing.assert_close(rows, torch.tensor([math.exp(0.3), math.exp(-0.5), 1.0]))
    torch.testing.assert_close(output.sample_losses, rows)


def test_the_cap_truncates_and_huge_ratios_stay_finite() -> None:
    lp = batch(POLICY + torch.tensor([[500.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    output, rows = weighted(ObjectiveOutput(torch.ones(2)), lp, cap=2.0)
    torch.testing.assert_close(output.losses, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(rows, torch.tensor([2.0, math.exp(-0.5), 1.0]))


def test_the_weight_has_no_gradient() -> None:
    """d(w L)/dπ = w dL/dπ: the weight multiplies the loss and is not differentiated."""
    policy = POLICY.clone().requires_grad_()
    lp = batch(policy)
    plain = dpo(lp, beta=0.1)
    output, _ = weighted(plain, lp, cap=10.0)
    (got,) = torch.autograd.grad(output.losses[0], policy, retain_graph=True)
    (want,) = torch.autograd.grad(plain.losses[0], policy)
    torch.testing.assert_close(got, math.exp(-0.2) * want)


def test_data_of_a_data_set_is_not_weighted() -> None:
    lp = batch(POLICY)
    offline = ResponseLogps(policy=lp.policy, mask=lp.mask, pairs=lp.pairs)
    output, rows = weighted(ObjectiveOutput(torch.ones(2)), offline, cap=2.0)
    assert torch.equal(output.losses, torch.ones(2)) and torch.equal(rows, torch.ones(3))
