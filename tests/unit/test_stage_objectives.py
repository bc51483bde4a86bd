"""The objectives of SFT and of reward models: values derived by hand, gradients, and rows that must not matter."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from prefopt.recipe.registry import STAGES, stage_objective
from prefopt.types import ResponseLogps, ResponseScores

PAIRS = torch.tensor([[0, 1], [3, 2]])


def scores(*values: float, rewards: list[float] | None = None) -> ResponseScores:
    given = None if rewards is None else torch.tensor(rewards, dtype=torch.float64)
    return ResponseScores(torch.tensor(values, dtype=torch.float64), PAIRS, given)


def test_bradley_terry_is_what_is_derived_by_hand() -> None:
    """-log σ(2 - 1) = log(1 + 1/e) = 0.31326; -log σ(0 - 0) = log 2. Accuracy of a tie: one half."""
    output = stage_objective("reward_model")(scores(2.0, 1.0, 0.0, 0.0))
    assert_close(output.losses, torch.tensor([0.31326169, 0.69314718], dtype=torch.float64))
    metrics = {name: value.tolist() for name, value in output.metrics.items()}
    assert metrics == {
        "rewards/chosen": [2.0, 0.0],
        "rewards/rejected": [1.0, 0.0],
        "rewards/margin": [1.0, 0.0],
        "rewards/accuracy": [1.0, 0.5],
    }


def test_a_margin_is_taken_off_the_difference_of_scores() -> None:
    """Pair 0: 2 - 1 - 1·(3 - 2) = 0, log 2. Pair 1: 0 - 0 - 1·(1 - 0) = -1, log(1 + e) = 1.31326."""
    seen = scores(2.0, 1.0, 0.0, 0.0, rewards=[3.0, 2.0, 0.0, 1.0])
    objective = stage_objective("reward_model", margin_weight=1.0)
    wanted = torch.tensor([0.69314718, 1.31326169], dtype=torch.float64)
    assert_close(objective(seen).losses, wanted)
    half = stage_objective("reward_model", margin_weight=0.5)(seen)
    assert not torch.allclose(half.losses, wanted)
    assert_close(half.metrics["rewards/margin"], torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="no margins"):
        objective(scores(1.0, 1.0, 1.0, 1.0))


def test_the_gradient_of_bradley_terry() -> None:
    values = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return stage_objective("reward_model")(ResponseScores(x, PAIRS)).losses

    assert torch.autograd.gradcheck(losses, values)


def test_sft_is_the_nll_of_the_samples_and_of_nothing_else() -> None:
    """Rows: two samples with log-probs -1 -2 and -3, a row that does not count, NaN outside the mask."""
    nan = float("nan")
    lp = ResponseLogps(
        policy=torch.tensor([[-1.0, -2.0], [-3.0, nan], [-9.0, -9.0]]),
        mask=torch.tensor([[True, True], [True, False], [True, True]]),
        pairs=torch.empty(0, 2, dtype=torch.long),
        samples=torch.tensor([True, True, False]),
    )
    output = stage_objective("sft")(lp)
    assert output.sample_token_losses is not None
    assert output.sample_token_losses.tolist() == [3.0, 3.0, 0.0]
    assert output.sample_losses is None
    assert len(output.losses) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_an_objective_that_cites_its_source(stage: str) -> None:
    spec = stage_objective(stage).spec
    assert spec.source
    assert "Source:" in (spec.fn.__doc__ or "")
