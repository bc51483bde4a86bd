"""What must hold for every registered objective, whatever its formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prefopt.recipe.registry import Need, get_objective, needs_with
from prefopt.types import ResponseLogps
from tests.unit.objective_cases import (
    BINDING,
    NAMES,
    ON_PAIRS,
    ON_SAMPLES,
    all_metrics,
    call,
    gradient,
    per_pair,
    per_sample,
    perturbed,
    positional_parameters,
    random_batch,
    toy_batch,
    unreduced,
)

REFERENCE_BASED = [name for name in NAMES if Need.REFERENCE in get_objective(name).needs]
WEIGHTED_NLL = {"r_lol", "a_lol", "a_lol_seq", "a_lol_kl"}
"""Their reference weighs the NLL of the policy, which a shift changes."""
NEEDED_FIELDS = {
    Need.REFERENCE: "reference",
    Need.BEHAVIOR: "behavior",
    Need.ADVANTAGES: "advantages",
    Need.REWARDS: "rewards",
    Need.GROUPS: "group",
}
"""Which field of `ResponseLogps` meets a need. PAIRS and SAMPLES may always be empty, and CONDITION is a matter of
the prompt."""
HELD = {
    "r_lol": {"epsilon": 1e-12},
    "a_lol": {"epsilon": 1e-12},
    "a_lol_seq": {"epsilon": 1e-12},
    "r_gold": {"min_weight": 1.0},
}
"""Values that clip a weight to a constant, where it is one to autograd and would move with finite differences.
test_weighted_objectives.py has the gradients where it does move."""


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hypo"])
@pytest.mark.parametrize("defaults", [True, False], ids=["defaults", "perturbed"])
def test_gradients_are_those_of_the_loss(name: str, defaults: bool) -> None:
    """Autograd against finite differences in fp64, token and sample losses included.

    Not hypo's, whose weights are constants to autograd: test_sample_objectives.py has its gradient.
    """
    batch = random_batch(torch.float64)
    values = HELD.get(name, {} if defaults else perturbed(name))

    def losses(policy: Tensor) -> Tensor:
        return unreduced(call(name, dataclasses.replace(batch, policy=policy), **values))

    assert torch.autograd.gradcheck(losses, (batch.policy.clone().requires_grad_(),))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_per_pair_or_per_response_and_keep_the_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        output = call(name, random_batch(dtype), **perturbed(name))
        pairs = [output.losses, *output.metrics.values()]
        pairs += [output.token_losses] if output.token_losses is not None else []
        samples = [*output.sample_metrics.values()]
        losses = per_sample(output)
        samples += [losses] if losses is not None else []
        assert all(tensor.shape == (4,) and tensor.dtype == dtype for tensor in pairs)
        assert all(tensor.shape == (7,) and tensor.dtype == dtype for tensor in samples)
        assert (losses is not None) == (name in ON_SAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_carry_no_graph(name: str) -> None:
    batch = random_batch()
    batch.policy.requires_grad_()
    output = call(name, batch, **perturbed(name))
    assert unreduced(output).requires_grad
    assert not any(metric.requires_grad for metric in all_metrics(output).values())


def _widened(lp: ResponseLogps, left: int, right: int, filler: float) -> ResponseLogps:
    def pad(values: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(values, (left, right), value=value)

    assert lp.reference is not None
    assert lp.behavior is not None
    return dataclasses.replace(
        lp,
        policy=pad(lp.policy, filler),
        reference=pad(lp.reference, filler),
        behavior=pad(lp.behavior, filler),
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
    assert_close(unreduced(call(name, wide, **values)), unreduced(call(name, batch, **values)))
    metrics, wide_metrics = (all_metrics(call(name, lp, **values)) for lp in (batch, wide))
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
    assert batch.behavior is not None
    dirty = dataclasses.replace(
        batch,
        policy=torch.where(batch.mask, batch.policy, garbage),
        reference=torch.where(batch.mask, batch.reference, garbage),
        behavior=torch.where(batch.mask, batch.behavior, garbage),
    )
    _assert_equal_in_all(name, dirty, batch)


@pytest.mark.parametrize("name", ON_SAMPLES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_what_stands_in_rows_that_are_no_samples_does_not_reach_the_samples(
    name: str, garbage: float
) -> None:
    batch = random_batch()
    assert batch.behavior is not None
    assert batch.advantages is not None
    assert batch.rewards is not None
    assert batch.samples is not None
    dirty = dataclasses.replace(
        batch,
        behavior=torch.where(batch.samples[:, None], batch.behavior, garbage),
        advantages=torch.where(batch.samples, batch.advantages, garbage),
        rewards=torch.where(batch.samples, batch.rewards, garbage),
    )
    _assert_equal_in_all(name, dirty, batch)


def _assert_equal_in_all(name: str, left: ResponseLogps, right: ResponseLogps) -> None:
    """Losses, gradients and metrics, to the last bit."""
    values = perturbed(name)
    outputs = [call(name, lp, **values) for lp in (left, right)]
    assert torch.equal(unreduced(outputs[0]), unreduced(outputs[1]))
    assert torch.equal(gradient(name, left, **values), gradient(name, right, **values))
    left_metrics, right_metrics = map(all_metrics, outputs)
    assert all(torch.equal(left_metrics[key], value) for key, value in right_metrics.items())


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
        unreduced(call(name, zero, **values)),
        unreduced(call(name, nearly, **values)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", NAMES)
def test_row_order_changes_nothing(name: str) -> None:
    batch = random_batch()
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])  # new row i holds old row order[i]
    by_row = (
        "policy",
        "reference",
        "mask",
        "behavior",
        "rewards",
        "advantages",
        "samples",
        "group",
    )
    shuffled = dataclasses.replace(
        batch,
        pairs=order.argsort()[batch.pairs],
        **{field: getattr(batch, field)[order] for field in by_row},
    )
    values = perturbed(name)
    before, after = (call(name, lp, **values) for lp in (batch, shuffled))
    assert torch.equal(per_pair(after), per_pair(before))
    of_samples = per_sample(before), per_sample(after)
    if of_samples[0] is not None:
        assert of_samples[1] is not None
        assert torch.equal(of_samples[1], of_samples[0][order])


@pytest.mark.parametrize("name", ON_PAIRS)
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


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_a_sample_sees_only_its_group(name: str) -> None:
    batch = random_batch()
    assert batch.group is not None
    assert batch.samples is not None
    values = perturbed(name)
    together = per_sample(call(name, batch, **values))
    alone = torch.zeros(7)
    for number in batch.group.unique():
        part = dataclasses.replace(batch, samples=batch.samples & (batch.group == number))
        losses = per_sample(call(name, part, **values))
        assert losses is not None
        alone += losses
    assert together is not None
    assert torch.equal(alone, together)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_nothing_to_learn_from_still_runs_backward(name: str) -> None:
    """A rank whose window has nothing must join the others' collectives, with a gradient of zero."""
    filler = dataclasses.replace(
        random_batch(),
        pairs=torch.empty(0, 2, dtype=torch.long),
        samples=torch.zeros(7, dtype=torch.bool),
    )
    values = perturbed(name)
    assert torch.equal(gradient(name, filler, **values), torch.zeros(7, 6))
    output = call(name, filler, **values)
    nothing = [unreduced(output), *all_metrics(output).values()]
    assert not any(tensor.any() for tensor in nothing)


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_without_rollouts_there_are_no_sample_losses_and_nothing_is_asked_for(name: str) -> None:
    """As at an evaluation on pairs: no row is a sample."""
    offline = dataclasses.replace(
        random_batch(), samples=None, behavior=None, advantages=None, rewards=None, group=None
    )
    output = call(name, offline)
    losses = per_sample(output)
    assert losses is not None
    assert torch.equal(losses, torch.zeros(7))
    assert not any(metric.any() for metric in output.sample_metrics.values())
    assert output.losses.shape == (4,)


@pytest.mark.parametrize("name", [name for name in REFERENCE_BASED if name not in WEIGHTED_NLL])
def test_a_shared_shift_of_policy_and_reference_changes_nothing(name: str) -> None:
    """Only the log-ratio counts. Shifting the shared tokens alone, where one variant weighs them unlike."""
    batch = random_batch(torch.float64)
    assert batch.reference is not None
    values = {key: 0.0 if key == "nll_weight" else v for key, v in perturbed(name).items()}
    shift = torch.where(batch.mask, torch.linspace(-1, 1, 42, dtype=torch.float64).view(7, 6), 0.0)
    if name == "ld_dpo_policy_only":
        shift[:, 1:] = 0.0  # every response has a first token, which no pair weighs by α
    shifted = dataclasses.replace(
        batch, policy=batch.policy + shift, reference=batch.reference + shift
    )
    assert_close(unreduced(call(name, shifted, **values)), unreduced(call(name, batch, **values)))


@pytest.mark.parametrize("name", NAMES)
def test_needs_say_what_is_used_and_no_more(name: str) -> None:
    """At the defaults and, where a weight switches a need on, with that weight."""
    spec, batch = get_objective(name), random_batch()
    for values in ({}, dict.fromkeys(spec.needs_when, 0.0), dict.fromkeys(spec.needs_when, 0.5)):
        needs = needs_with(spec, values)
        assert needs & {Need.PAIRS, Need.SAMPLES, Need.REWARDS, Need.ADVANTAGES}
        unused = {field: None for need, field in NEEDED_FIELDS.items() if need not in needs}
        call(name, dataclasses.replace(batch, **unused), **values)
        if spec.needs_when and not values.get("beta", 1.0):
            continue  # rloo always says GROUPS, and reads them for the term that is off
        for need in needs & NEEDED_FIELDS.keys():
            with pytest.raises(ValueError, match=need.value):
                call(name, dataclasses.replace(batch, **{NEEDED_FIELDS[need]: None}), **values)


@pytest.mark.parametrize("name", REFERENCE_BASED)
def test_another_reference_is_another_loss(name: str) -> None:
    batch = random_batch()
    other = dataclasses.replace(batch, reference=random_batch(seed=1).reference)
    assert not torch.allclose(unreduced(call(name, other)), unreduced(call(name, batch)), rtol=1e-3)


HYPER_PARAMETERS = [(name, key) for name in NAMES for key in get_objective(name).fields]


@pytest.mark.parametrize(("name", "key"), HYPER_PARAMETERS)
def test_every_hyper_parameter_changes_the_loss(name: str, key: str) -> None:
    """Nothing a recipe may set is ignored. The toy batch has a fallen chosen response and unequal lengths."""
    batch = random_batch() if name in ON_SAMPLES else toy_batch()

    def total(values: dict[str, float]) -> Tensor:
        """Padded, since a term with weight 0 is not there at all."""
        losses = unreduced(call(name, batch, **BINDING.get(name, {}) | values))
        return torch.nn.functional.pad(losses, (0, 20 - len(losses)))

    difference = (total({key: perturbed(name)[key]}) - total({})).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_takes_log_probs_and_keywords_only(name: str) -> None:
    assert positional_parameters(name) == ["lp"]


@pytest.mark.parametrize("name", [n for n in NAMES if "nll_weight" in get_objective(n).fields])
def test_without_nll_weight_no_token_term_is_computed(name: str) -> None:
    output = call(name, random_batch(), nll_weight=0.0)
    assert output.token_losses is None
    assert "nll/chosen" not in output.metrics


@pytest.mark.parametrize("name", ON_PAIRS)
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
