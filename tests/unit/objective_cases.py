"""Batches of token log-probs for tests of objectives, and ways to disturb them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from prefopt.recipe.entries import parameters
from prefopt.recipe.registry import OBJECTIVES, Need, get_objective, reads_samples
from prefopt.types import ObjectiveOutput, ResponseLogps

NAMES = sorted(OBJECTIVES)
ON_PAIRS = [name for name in NAMES if Need.PAIRS in get_objective(name).needs]
WEIGHTED = [name for name in NAMES if reads_samples(get_objective(name).needs)]
"""Those that weigh single responses by a reward or an advantage, of a data set or of rollouts."""
ON_SAMPLES = [n for n in NAMES if Need.SAMPLES in get_objective(n).needs or n in WEIGHTED]
REQUIRED: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_tokens": 5},
    "filtered_nll": {"threshold": 0.5},
    "a_lol_kl": {"beta": 0.2},
}
"""Hyper-parameters without a default, with what `call` gives them."""
BINDING: dict[str, dict[str, Any]] = {"rwr": {"beta": 0.2}}
"""Values under which every hyper-parameter is felt: at its defaults, `rwr` clips nothing in `random_batch`."""


def toy_batch() -> ResponseLogps:
    """Two pairs whose sums and means can be done in the head; the second pair's chosen is the last row.

    | row |            | log π             | log π_ref         | Σ log π (mean)  | Σ ρ (mean)     |
    |-----|------------|-------------------|-------------------|-----------------|----------------|
    | 0   | A chosen   | -1   -0.5  -0.5   | -1.5 -0.5  -1     | -2    (-2/3)    | 1     (1/3)    |
    | 1   | A rejected | -1   -2           | -0.5 -1.5         | -3    (-1.5)    | -1    (-0.5)   |
    | 2   | B rejected | -0.5 -0.25 -0.75  | -1   -0.5  -1     | -1.5  (-0.5)    | 1     (1/3)    |
    | 3   | B chosen   | -1                | -0.5              | -1    (-1)      | -0.5  (-0.5)   |

    ρ = log π - log π_ref. Summed margins: h_A = 1 - (-1) = 2, h_B = -0.5 - 1 = -1.5. Rewards 1, 0.2, 0.8, 1:
    B's rejected response is a good one.
    """
    policy = [[-1.0, -0.5, -0.5], [-1.0, -2.0, 0.0], [-0.5, -0.25, -0.75], [-1.0, 0.0, 0.0]]
    reference = [[-1.5, -0.5, -1.0], [-0.5, -1.5, 0.0], [-1.0, -0.5, -1.0], [-0.5, 0.0, 0.0]]
    return ResponseLogps(
        policy=torch.tensor(policy),
        mask=torch.arange(3) < torch.tensor([3, 2, 3, 1])[:, None],
        pairs=torch.tensor([[0, 1], [3, 2]]),
        reference=torch.tensor(reference),
        rewards=torch.tensor([1.0, 0.2, 0.8, 1.0]),
    )


def random_batch(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> ResponseLogps:
    """Seven responses of 1 to 6 tokens, in four pairs and in three groups.

    Row 0 is in two pairs, and rows are out of order. Samples are rows 1 and 3 of one group, rows 2 and 4 of
    another, and row 5, alone; their ratios to the sampler lie on both sides of the usual clip range.
    """
    generator = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return -torch.rand(7, 6, generator=generator, dtype=torch.float64).to(dtype) * 2

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(6) < torch.tensor([4, 6, 1, 2, 5, 3, 3])[:, None]
    samples = torch.tensor([False, True, True, True, True, True, False])
    policy, reference = (torch.where(mask, logps(), 0.0) for _ in range(2))
    return ResponseLogps(
        policy=policy,
        mask=mask,
        pairs=torch.tensor([[0, 1], [0, 3], [4, 2], [6, 5]]),
        reference=reference,
        behavior=torch.where(mask & samples[:, None], policy - 0.4 * noise(7, 6), 0.0),
        rewards=noise(7),
        advantages=torch.where(samples, noise(7), 0.0),
        samples=samples,
        group=torch.tensor([4, 4, 0, 4, 0, 9, 9]),
    )


def call(name: str, lp: ResponseLogps, **values: Any) -> ObjectiveOutput:
    """The objective's output; values go through its schema, so a test cannot use one a recipe may not."""
    schema = parameters(get_objective(name))
    return get_objective(name).fn(lp, **schema(**REQUIRED.get(name, {}) | values).model_dump())


def per_pair(output: ObjectiveOutput) -> Tensor:
    """(P, 1 or 2): losses and, where there are any, token losses."""
    parts = [output.losses] if output.token_losses is None else [output.losses, output.token_losses]
    return torch.stack(parts, dim=-1)


def unreduced(output: ObjectiveOutput) -> Tensor:
    """(P, 2P, P + R, …): everything the trainer will sum, one value after the other."""
    rows = [output.sample_losses, output.sample_token_losses]
    return torch.cat([per_pair(output).flatten(), *(row for row in rows if row is not None)])


def per_sample(output: ObjectiveOutput) -> Tensor | None:
    """(R,) the losses of responses, of whichever kind."""
    found = [output.sample_losses, output.sample_token_losses]
    assert None in found, "no objective has both kinds"
    return found[0] if found[1] is None else found[1]


def all_metrics(output: ObjectiveOutput) -> dict[str, Tensor]:
    """Metrics of pairs and of samples."""
    assert not output.metrics.keys() & output.sample_metrics.keys()
    return {**output.metrics, **output.sample_metrics}


def gradient(name: str, lp: ResponseLogps, **values: Any) -> Tensor:
    """(R, T) gradient of everything the objective returns for training, summed."""
    policy = lp.policy.clone().requires_grad_()
    unreduced(call(name, dataclasses.replace(lp, policy=policy), **values)).sum().backward()
    assert policy.grad is not None
    return policy.grad


def perturbed(name: str) -> dict[str, float]:
    """Every hyper-parameter moved off its default, all within bounds."""
    fields = get_objective(name).fields
    start = {key: default for key, (_, default) in fields.items()} | REQUIRED.get(name, {})
    assert all(value is not ... for value in start.values()), (
        f"{name} has a hyper-parameter without a default: give it a value in REQUIRED"
    )
    return {
        key: value + 2 if isinstance(value, int) else value * 1.5 + 0.1
        for key, value in start.items()
    }


def positional_parameters(name: str) -> list[str]:
    parameters = inspect.signature(get_objective(name).fn).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
