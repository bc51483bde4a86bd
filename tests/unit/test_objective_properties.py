"""What must hold for every registered objective, whatever its formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prefopt.registry import Need, get_objective
from prefopt.types import ResponseLogps
from tests.unit.objective_cases import (
    NAMES,
    call,
    gradient,
    needs_reference,
    per_pair,
    perturbed,
    positional_parameters,
    random_batch,
    toy_batch,
)

REFERENCE_BASED = [name for name in NAMES if needs_reference(name)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defaults", [True, False], ids=["defaults", "perturbed"])
def test_gradients_are_those_of_the_loss(name: str, defaults: bool) -> None:
    """Autograd against finite differences in fp64, token losses included."""
    batch = random_batch(torch.float64)
    values = {} if defaults else perturbed(name)

    def losses(policy: Tensor) -> Tensor:
        return per_pair(call(name, dataclasses.replace(batch, policy=policy), **values))

    assert torch.autograd.gradcheck(losses, (batch.policy.clone().requires_grad_(),))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_per_pair_and_keep_the_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        output = call(name, random_batch(dtype), **perturbed(name))
        tensors = [output.losses, *output.metrics.values()]
        tensors += [output.token_losses] if output.token_losses is not None else []
        assert all(tensor.shape == (4,) and tensor.dtype == dtype for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_carry_no_graph(name: str) -> None:
    batch = random_batch()
    batch.policy.requires_grad_()
    output = call(name, batch, **perturbed(name))
    assert per_pair(output).requires_grad
    assert not any(metric.requires_grad for metric in output.metrics.values())


def _widened(lp: ResponseLogps, left: int, right: int, filler: float) -> ResponseLogps:
    def pad(values: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(values, (left, right), value=value)

    assert lp.reference is not None
    return dataclasses.replace(
        lp,
        policy=pad(lp.policy, filler),
        reference=pad(lp.reference, filler),
        mask=pad(lp.mask.float(), 0.0).bool(),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("left", "right"), [(0, 5), (3, 0), (2, 2)])
@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_padding_width_side_and_content_change_nothing(
    name: str, left: int, right: int, filler: float
) -> None:
    batch = random_batch()
    wide = _widened(batch, left, right, filler)
    values = perturbed(name)
    assert_close(per_pair(call(name, wide, **values)), per_pair(call(name, batch, **values)))
    metrics, wide_metrics = (dict(call(name, lp, **values).metrics) for lp in (batch, wide))
    assert_close(wide_metrics, metrics)
    narrow = gradient(name, wide, **values)[:, left : left + batch.policy.shape[1]]
    assert_close(narrow, gradient(name, batch, **values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(
    name: str, garbage: float
) -> None:
    batch = random_batch()
    assert batch.reference is not None
    dirty = dataclasses.replace(
        batch,
        policy=torch.where(batch.mask, batch.policy, garbage),
        reference=torch.where(batch.mask, batch.reference, garbage),
    )
    values = perturbed(name)
    assert torch.equal(per_pair(call(name, dirty, **values)), per_pair(call(name, batch, **values)))
    assert torch.equal(gradient(name, dirty, **values), gradient(name, batch, **values))
    clean_metrics, dirty_metrics = (call(name, lp, **values).metrics for lp in (batch, dirty))
    assert all(torch.equal(dirty_metrics[key], value) for key, value in clean_metrics.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_log_prob_of_exactly_zero_inside_the_mask_is_a_token(name: str) -> None:
    """A certain token still has its length: lengths come from the mask, never from non-zero values."""
    batch = random_batch()
    assert batch.reference is not None
    policy, reference = batch.policy.clone(), batch.reference.clone()
    policy[:, 0], reference[:, 0] = 0.0, 0.0
    zero = dataclasses.replace(batch, policy=policy, reference=reference)
    nearly = dataclasses.replace(zero, policy=torch.where(batch.mask, policy - 1e-7, 0.0))
    values = perturbed(name)
    assert_close(
        per_pair(call(name, zero, **values)),
        per_pair(call(name, nearly, **values)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", NAMES)
def test_row_order_changes_nothing(name: str) -> None:
    batch = random_batch()
    assert batch.reference is not None
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])  # new row i holds old row order[i]
    shuffled = dataclasses.replace(
        batch,
        policy=batch.policy[order],
        reference=batch.reference[order],
        mask=batch.mask[order],
        pairs=order.argsort()[batch.pairs],
    )
    values = perturbed(name)
    assert torch.equal(
        per_pair(call(name, shuffled, **values)), per_pair(call(name, batch, **values))
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_does_not_see_the_other_pairs(name: str) -> None:
    """So any split of a batch over processes and micro-batches has the same per-pair losses."""
    batch = random_batch()
    values = perturbed(name)
    alone = [
        per_pair(call(name, dataclasses.replace(batch, pairs=batch.pairs[[index]]), **values))
        for index in (2, 0, 3, 1)
    ]
    together = per_pair(call(name, batch, **values))[[2, 0, 3, 1]]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_pairs_still_runs_backward(name: str) -> None:
    """A rank whose window has no pair must join the others' collectives, with a gradient of zero."""
    empty = dataclasses.replace(random_batch(), pairs=torch.empty(0, 2, dtype=torch.long))
    assert torch.equal(gradient(name, empty, **perturbed(name)), torch.zeros(7, 6))


@pytest.mark.parametrize("name", REFERENCE_BASED)
def test_a_shared_shift_of_policy_and_reference_changes_nothing(name: str) -> None:
    """Only the log-ratio counts. Shifting the shared tokens alone, where one variant weighs them unlike."""
    batch = random_batch(torch.float64)
    assert batch.reference is not None
    values = perturbed(name) | {"nll_weight": 0.0}
    shift = torch.where(batch.mask, torch.linspace(-1, 1, 42, dtype=torch.float64).view(7, 6), 0.0)
    if name == "ld_dpo_policy_only":
        shift[:, 1:] = 0.0  # every response has a first token, which no pair weighs by α
    shifted = dataclasses.replace(
        batch, policy=batch.policy + shift, reference=batch.reference + shift
    )
    assert_close(per_pair(call(name, shifted, **values)), per_pair(call(name, batch, **values)))


@pytest.mark.parametrize("name", NAMES)
def test_needs_say_whether_the_reference_is_used(name: str) -> None:
    batch = random_batch()
    without = dataclasses.replace(batch, reference=None)
    assert Need.PAIRS in get_objective(name).needs
    if not needs_reference(name):
        call(name, without)
        return
    with pytest.raises(ValueError, match="reference"):
        call(name, without)
    other = dataclasses.replace(batch, reference=random_batch(seed=1).reference)
    assert not torch.allclose(call(name, other).losses, call(name, batch).losses, rtol=1e-3)


HYPER_PARAMETERS = [(name, key) for name in NAMES for key in get_objective(name).fields]


@pytest.mark.parametrize(("name", "key"), HYPER_PARAMETERS)
def test_every_hyper_parameter_changes_the_loss(name: str, key: str) -> None:
    """Nothing a recipe may set is ignored. The toy batch has a fallen chosen response and unequal lengths."""

    def total(values: dict[str, float]) -> Tensor:
        output = call(name, toy_batch(), **values)
        token_losses = output.token_losses
        return output.losses + (torch.zeros(2) if token_losses is None else token_losses)

    difference = (total({key: perturbed(name)[key]}) - total({})).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_takes_log_probs_and_keywords_only(name: str) -> None:
    assert positional_parameters(name) == ["lp"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nll", "orpo")])
def test_without_nll_weight_no_token_term_is_computed(name: str) -> None:
    output = call(name, random_batch(), nll_weight=0.0)
    assert output.token_losses is None
    assert "nll/chosen" not in output.metrics


@pytest.mark.parametrize("name", NAMES)
def test_descent_from_the_reference_raises_the_chosen_response(name: str) -> None:
    """Above the rejected one for all; above where it was for all but apo_down, balanced at the start."""
    batch = random_batch()
    start = dataclasses.replace(batch, reference=batch.policy, pairs=torch.tensor([[1, 4]]))
    step = -gradient(name, start)
    chosen, rejected = step[1].sum(), step[4].sum()
    assert chosen > rejected
    if name == "apo_down":
        assert_close(chosen, torch.tensor(0.0), rtol=0, atol=1e-6)
    else:
        assert chosen > 0
