"""Objectives that train on samples: values derived by hand, limits, and gradients against enumeration.

The exact tests use a policy small enough to list everything it can say. What an objective's gradient must be
*on average* over samples is then a finite sum, and needs no tolerance for chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prefopt.credit.base import GroupScores
from prefopt.recipe.registry import get_credit, get_objective
from prefopt.types import ResponseLogps
from tests.unit.objective_cases import ON_SAMPLES, WEIGHTED, call, gradient, random_batch

NO_PAIRS = torch.empty(0, 2, dtype=torch.long)
LOG2 = math.log(2)


def toy_rollouts() -> ResponseLogps:
    """Two samples of one prompt (rows 0, 1), one of another (row 3), and an offline pair (rows 2, 4).

    Row 2 is in the group of rows 0 and 1, as where the data has a response to a sampled prompt.

    | row |        | A    | ρ = π/π_sampler | d = log π_ref - log π |
    |-----|--------|------|-----------------|-----------------------|
    | 0   | sample | 1    | 1.5  1          | log 2   0             |
    | 1   | sample | -2   | 0.5  1.5  1     | 0   0   -log 2        |
    | 2   | chosen |      |                 | -1                    |
    | 3   | sample | 0.5  | 0.5             | 0                     |
    | 4   | reject |      |                 | 1                     |
    """
    mask = torch.arange(3) < torch.tensor([2, 3, 1, 1, 1])[:, None]
    policy = torch.where(mask, torch.tensor([-1.0, -0.5, -2.0]), 0.0)
    ratio = torch.tensor([[1.5, 1, 1], [0.5, 1.5, 1], [1, 1, 1], [0.5, 1, 1], [1, 1, 1]])
    gap = torch.tensor([[LOG2, 0, 0], [0, 0, -LOG2], [-1, 0, 0], [0, 0, 0], [1, 0, 0]])
    samples = torch.tensor([True, True, False, True, False])
    return ResponseLogps(
        policy=policy,
        mask=mask,
        pairs=torch.tensor([[2, 4]]),
        reference=torch.where(mask, policy + gap, 0.0),
        behavior=torch.where(samples[:, None] & mask, policy - ratio.log(), 0.0),
        advantages=torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]),
        samples=samples,
        group=torch.tensor([7, 7, 7, 9, 3]),
    )


@dataclass(frozen=True)
class Row:
    """What an objective must return on `toy_rollouts`, for rows 0, 1 and 3; 0 on the others."""

    losses: tuple[float, float, float]
    values: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    pair_losses: tuple[float, ...] = (0.0,)


# Tokens of row 0: -min(1.5, 1.2), -1. Row 1: 0.8·2 = 1.6 (clipped), 1.5·2 = 3 (A < 0: not clipped above), 2.
# Row 3: -0.5·0.5 (A > 0: not clipped below).
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
TOKEN_RATIOS = {"ratio/mean": (1.25, 1.0, 0.5), "ratio/clipped_frac": (0.5, 1 / 3, 0.0)}
# k3 of log 2: 2 - log 2 - 1 = 0.3068528; of -log 2: 0.5 + log 2 - 1 = 0.1931472. Halves and thirds a token.
K3 = {"kl/k3_per_token": (0.1534264, 0.0643824, 0.0)}
# Ratios of the whole response: 1.5, 0.75, 0.5.
SEQUENCE_RATIOS = (1.5, 0.75, 0.5)

REFERENCE_VALUES: dict[str, list[Row]] = {
    "grpo": [
        Row((-1.1, 2.2, -0.25), {**CLIP, "beta": 0.0}, TOKEN_RATIOS),
        # 0.1 · (0.1534264, 0.0643824)
        Row((-1.0846574, 2.2064382, -0.25), {**CLIP, "beta": 0.1}, TOKEN_RATIOS | K3),
        # Row 0: -1.3 and -1. Row 1: 0.6·2 = 1.2, 3, 2.
        Row(
            (-1.15, 6.2 / 3, -0.25),
            {"epsilon_low": 0.4, "epsilon_high": 0.3, "beta": 0.0},
            TOKEN_RATIOS,
        ),
    ],
    "dr_grpo": [
        Row((-0.22, 0.66, -0.025), {**CLIP, "max_tokens": 10, "beta": 0.0}, TOKEN_RATIOS),
        # + 0.1 · (0.3068528, 0.1931472) / 10
        Row(
            (-0.2169315, 0.6619315, -0.025),
            {**CLIP, "max_tokens": 10, "beta": 0.1},
            TOKEN_RATIOS | K3,
        ),
    ],
    "rloo": [
        # -1.2 · 1, 0.8 · 2, -0.5 · 0.5
        Row(
            (-1.2, 1.6, -0.25),
            {**CLIP, "beta": 0.0},
            {"ratio/mean": SEQUENCE_RATIOS, "ratio/clipped_frac": (1.0, 1.0, 0.0)},
        ),
        # kl = Σ log π_sampler - log π_ref = -log ρ - Σ d: -log 3, -log 0.75 + log 2 = log 8/3, log 2.
        # Halved, minus the other's: ∓ log(8)/2 = ∓1.0397208, and log(2)/2 = 0.3465736 for the lone sample.
        # A' = 2.0397208, -3.0397208, 0.1534264; times -1.2, -0.8, -0.5.
        Row(
            (-2.4476649, 2.4317766, -0.0767132),
            {**CLIP, "beta": 0.5},
            {
                "ratio/mean": SEQUENCE_RATIOS,
                "ratio/clipped_frac": (1.0, 1.0, 0.0),
                "rewards/kl_penalty": (-0.5493061, 0.4904146, 0.3465736),
            },
        ),
        # Ratio 0.75 is inside 1 ± 0.4, 1.5 is not: 1.4 · 1, 0.75 · 2, 0.5 · 0.5
        Row(
            (-1.4, 1.5, -0.25),
            {"epsilon_low": 0.4, "epsilon_high": 0.4, "beta": 0.0},
            {"ratio/mean": SEQUENCE_RATIOS, "ratio/clipped_frac": (1.0, 0.0, 0.0)},
        ),
    ],
    "hypo": [
        # λ k with k = -Σ d; the pair: β h = 0.5 · (1 - (-1)) = 1, -log σ(1) = 0.3132617
        Row(
            (-0.1 * LOG2, 0.1 * LOG2, 0.0),
            {"beta": 0.5, "kl_weight": 0.1},
            pair_losses=(0.3132617,),
        ),
    ],
}
ROWS = [
    pytest.param(name, row, id=f"{name}-{index}")
    for name, rows in REFERENCE_VALUES.items()
    for index, row in enumerate(rows)
]


def on_toy_rows(values: tuple[float, float, float]) -> Tensor:
    first, second, third = values
    return torch.tensor([first, second, 0.0, third, 0.0])


@pytest.mark.parametrize("name", sorted(set(ON_SAMPLES) - set(WEIGHTED)))
def test_every_objective_on_samples_has_reference_values_for_every_hyper_parameter(
    name: str,
) -> None:
    covered = {key for row in REFERENCE_VALUES[name] for key in row.values}
    assert set(get_objective(name).fields) == covered


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_losses_and_metrics_are_those_derived_by_hand(name: str, row: Row) -> None:
    output = call(name, toy_rollouts(), **row.values)
    # The derivations carry seven digits.
    assert_close(output.losses, torch.tensor(row.pair_losses), rtol=0, atol=1e-6)
    assert_close(output.sample_losses, on_toy_rows(row.losses), rtol=0, atol=1e-6)
    expected = {key: on_toy_rows(value) for key, value in row.metrics.items()}
    assert_close(dict(output.sample_metrics), expected, rtol=0, atol=1e-6)
    assert output.token_losses is None


def test_hypo_weighs_a_sample_by_its_kl_above_its_groups() -> None:
    """λ w_i on every token: k = (-log 2, log 2) in a group, so w = ∓2 log 2; the lone sample's k is 0."""
    step = gradient("hypo", toy_rollouts(), beta=0.5, kl_weight=0.1)
    tokens = toy_rollouts().mask[[0, 1, 3]]
    weights = torch.tensor([-0.2 * LOG2, 0.2 * LOG2, 0.0])[:, None]
    assert_close(step[[0, 1, 3]], weights * tokens)


def test_hypo_gives_a_lone_sample_its_whole_kl() -> None:
    """With one sample a prompt there is no baseline: w = k."""
    rollouts = dataclasses.replace(toy_rollouts(), group=torch.arange(5), pairs=NO_PAIRS)
    step = gradient("hypo", rollouts, kl_weight=0.1)
    weights = torch.tensor([-0.1 * LOG2, 0.1 * LOG2, 0.0, 0.0, 0.0])[:, None]
    assert_close(step, weights * rollouts.mask)


def test_a_clipped_token_has_no_gradient_and_the_others_theirs() -> None:
    """-ρ A / |y| where not clipped: row 0 token 1; row 1 tokens 1 and 2; row 3."""
    step = gradient("grpo", toy_rollouts(), epsilon_low=0.2, epsilon_high=0.2)
    expected = [[0, -0.5, 0], [0, 1.0, 2 / 3], [0, 0, 0], [-0.25, 0, 0], [0, 0, 0]]
    assert_close(step, torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "values", "per_token"),
    [
        ("grpo", {}, lambda lp: 1 / lp.mask.sum(-1, keepdim=True)),
        ("dr_grpo", {"max_tokens": 9}, lambda _: 1 / 9),
        ("rloo", {"beta": 0.0}, lambda _: 1.0),
    ],
)
def test_on_policy_the_gradient_is_that_of_reinforce(
    name: str, values: dict[str, Any], per_token: Callable[[ResponseLogps], Any]
) -> None:
    """At ρ = 1: -A ∇log π, weighted as the objective weighs tokens. -A log π itself is never formed."""
    batch = random_batch()
    assert batch.advantages is not None
    on_policy = dataclasses.replace(batch, behavior=batch.policy)
    step = gradient(name, on_policy, **values)
    assert_close(step, -batch.advantages[:, None] * per_token(batch) * batch.mask)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_without_clipping_the_loss_is_the_importance_weighted_advantage(name: str) -> None:
    batch, wide = random_batch(), {"epsilon_low": 1e6, "epsilon_high": 1e6, "beta": 0.0}
    assert batch.behavior is not None
    assert batch.advantages is not None
    assert batch.samples is not None
    log_ratio = torch.where(batch.samples[:, None], batch.policy - batch.behavior, 0.0)
    tokens = log_ratio.exp() * batch.mask
    expected = {
        "grpo": tokens.sum(-1) / batch.mask.sum(-1),
        "dr_grpo": tokens.sum(-1) / 5,
        "rloo": log_ratio.sum(-1).exp(),
    }[name]
    output = call(name, batch, **wide)
    assert_close(output.sample_losses, -batch.advantages * expected)
    assert not output.sample_metrics["ratio/clipped_frac"].any()


@pytest.mark.parametrize("credit", ["group_mean", "group_mean_std", "leave_one_out"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_constant_rewards_have_no_gradient(name: str, credit: str) -> None:
    scores = GroupScores((0.1,) * 7, tuple((i,) for i in range(7)), random.Random(0))
    advantages = get_credit(credit).fn(scores, keep_degenerate=True).advantages
    batch = dataclasses.replace(random_batch(), advantages=torch.tensor(advantages))
    assert not gradient(name, batch, beta=0.0).any()


def test_rloo_clips_a_response_and_grpo_a_token() -> None:
    """Ratios 1.5 and 1/1.5: the product is 1, inside the clip range, and each token is outside of it."""
    policy = torch.zeros(1, 2)
    rollouts = ResponseLogps(
        policy=policy,
        mask=torch.ones(1, 2, dtype=torch.bool),
        pairs=NO_PAIRS,
        behavior=torch.tensor([[-math.log(1.5), math.log(1.5)]]),
        advantages=torch.tensor([1.0]),
        samples=torch.tensor([True]),
        group=torch.tensor([0]),
    )
    assert_close(gradient("rloo", rollouts, beta=0.0), torch.tensor([[-1.0, -1.0]]))
    assert_close(gradient("grpo", rollouts), torch.tensor([[0.0, -1 / 3]]))


@pytest.mark.parametrize("gap", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_k3_near_the_reference_has_the_digits_of_fp64(gap: float, sign: float) -> None:
    """d²/2 at d = 1e-4 is 5e-9: e^d - d - 1, taken literally in fp32, is rounding noise of 1e-7."""

    def kl(dtype: torch.dtype) -> float:
        policy = torch.full((1, 1), -1.0, dtype=dtype)
        rollouts = ResponseLogps(
            policy=policy,
            reference=policy + sign * gap,
            behavior=policy,
            mask=torch.ones(1, 1, dtype=torch.bool),
            pairs=NO_PAIRS,
            advantages=torch.zeros(1, dtype=dtype),
            samples=torch.tensor([True]),
        )
        return call("grpo", rollouts, beta=1.0).sample_metrics["kl/k3_per_token"].item()

    # The subtraction of the log-probs, near 1 nat, leaves d itself an error of 6e-8.
    assert kl(torch.float32) == pytest.approx(kl(torch.float64), rel=2 * 1.2e-7 / gap + 1e-4)


# --- exact expectations over a policy that can be listed -----------------------------------------


class TinyPolicy:
    """Two tokens of three symbols, the second depending on the first: nine responses, fp64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        self.logits = draw[0].clone().requires_grad_()
        """Row 0: the first token; row 1 + i: the second after symbol i."""
        self.reference_logits = draw[1]
        self.responses = list(itertools.product(range(3), repeat=2))
        self.rewards = torch.randn(9, generator=generator, dtype=torch.float64)

    def logps(self, logits: Tensor) -> Tensor:
        """(9, 2) log-probs of each response's tokens."""
        logs = logits.log_softmax(-1)
        return torch.stack([torch.stack([logs[0, a], logs[1 + a, b]]) for a, b in self.responses])

    def kl(self) -> Tensor:
        policy, reference = (self.logps(x).sum(-1) for x in (self.logits, self.reference_logits))
        return (policy.exp() * (policy - reference)).sum()

    def expected_gradient(self, num_samples: int, name: str, **values: Any) -> Tensor:
        """Mean over all draws of ``num_samples`` responses of the gradient of their mean loss, on-policy."""
        logps, reference = self.logps(self.logits), self.logps(self.reference_logits)
        total = torch.zeros((), dtype=torch.float64)
        for draw in itertools.product(range(9), repeat=num_samples):
            rows = list(draw)
            rollouts = ResponseLogps(
                policy=logps[rows],
                reference=reference[rows],
                behavior=logps[rows].detach(),
                mask=torch.ones(num_samples, 2, dtype=torch.bool),
                pairs=NO_PAIRS,
                advantages=self._advantages(rows),
                samples=torch.ones(num_samples, dtype=torch.bool),
                group=torch.zeros(num_samples, dtype=torch.long),
            )
            probability = logps[rows].sum().exp().detach()
            losses = call(name, rollouts, **values).sample_losses
            assert losses is not None
            total = total + probability * losses.mean()
        (result,) = torch.autograd.grad(total, self.logits)
        return result

    def _advantages(self, rows: list[int]) -> Tensor:
        if len(rows) == 1:
            return self.rewards[rows]
        scores = GroupScores(
            tuple(self.rewards[rows].tolist()), ((),) * len(rows), random.Random(0)
        )
        labels = get_credit("leave_one_out").fn(scores, keep_degenerate=True)
        return torch.tensor(labels.advantages, dtype=torch.float64)


def gradient_of(value: Tensor, policy: TinyPolicy) -> Tensor:
    return torch.autograd.grad(value, policy.logits)[0]


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_hypo_has_the_reverse_kl_gradient_on_average(num_samples: int) -> None:
    """With the leave-one-out baseline (k > 1) as without it."""
    policy = TinyPolicy()
    exact = gradient_of(policy.kl(), policy)
    assert_close(policy.expected_gradient(num_samples, "hypo", kl_weight=1.0), exact)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_rloo_has_the_gradient_of_expected_reward_minus_kl_on_average(beta: float) -> None:
    policy = TinyPolicy()
    probabilities = policy.logps(policy.logits).sum(-1).exp()
    goal = (probabilities * policy.rewards).sum() - beta * policy.kl()
    exact = gradient_of(-goal, policy)
    assert_close(policy.expected_gradient(2, "rloo", beta=beta), exact)


def test_dr_grpo_has_the_gradient_of_expected_reward_on_average_over_its_constant() -> None:
    policy = TinyPolicy()
    goal = (policy.logps(policy.logits).sum(-1).exp() * policy.rewards).sum()
    exact = gradient_of(-goal, policy) / 9
    assert_close(policy.expected_gradient(2, "dr_grpo", max_tokens=9), exact)


def test_k3_is_the_kl_on_average() -> None:
    """Of the two-token response: 2 · the mean over its tokens of KL(π ‖ π_ref) given what came before."""
    policy = TinyPolicy()
    logps, reference = (policy.logps(x) for x in (policy.logits, policy.reference_logits))
    rollouts = ResponseLogps(
        policy=logps,
        reference=reference,
        behavior=logps.detach(),
        mask=torch.ones(9, 2, dtype=torch.bool),
        pairs=NO_PAIRS,
        advantages=torch.zeros(9),
        samples=torch.ones(9, dtype=torch.bool),
    )
    k3 = call("grpo", rollouts, beta=1.0).sample_metrics["kl/k3_per_token"]
    assert_close(2 * (logps.sum(-1).exp() * k3).sum(), policy.kl())


def test_the_gradient_of_k3_is_that_of_the_forward_kl_on_average() -> None:
    """KL(π_ref ‖ π) of the first token, and of the second after each first one the policy says."""
    policy = TinyPolicy()
    policy.rewards = torch.zeros(9, dtype=torch.float64)
    logs, reference = (x.log_softmax(-1) for x in (policy.logits, policy.reference_logits))
    forward_kl = (reference.exp() * (reference - logs)).sum(-1)  # (4,)
    exact = forward_kl[0] + (logs[0].exp().detach() * forward_kl[1:]).sum()
    mean_of_two = policy.expected_gradient(1, "grpo", beta=1.0)
    assert_close(2 * mean_of_two, gradient_of(exact, policy))
