"""Batches of token log-probs for tests of objectives, and ways to disturb them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from prefopt.config.load import objective_schema
from prefopt.registry import OBJECTIVES, Need, get_objective
from prefopt.types import ObjectiveOutput, ResponseLogps

NAMES = sorted(OBJECTIVES)


def toy_batch() -> ResponseLogps:
    """Two pairs whose sums and means can be done in the head; the second pair's chosen is the last row.

    | row |            | log π             | log π_ref         | Σ log π (mean)  | Σ ρ (mean)     |
    |-----|------------|-------------------|-------------------|-----------------|----------------|
    | 0   | A chosen   | -1   -0.5  -0.5   | -1.5 -0.5  -1     | -2    (-2/3)    | 1     (1/3)    |
    | 1   | A rejected | -1   -2           | -0.5 -1.5         | -3    (-1.5)    | -1    (-0.5)   |
    | 2   | B rejected | -0.5 -0.25 -0.75  | -1   -0.5  -1     | -1.5  (-0.5)    | 1     (1/3)    |
    | 3   | B chosen   | -1                | -0.5              | -1    (-1)      | -0.5  (-0.5)   |

    ρ = log π - log π_ref. Summed margins: h_A = 1 - (-1) = 2, h_B = -0.5 - 1 = -1.5.
    """
    policy = [[-1.0, -0.5, -0.5], [-1.0, -2.0, 0.0], [-0.5, -0.25, -0.75], [-1.0, 0.0, 0.0]]
    reference = [[-1.5, -0.5, -1.0], [-0.5, -1.5, 0.0], [-1.0, -0.5, -1.0], [-0.5, 0.0, 0.0]]
    return ResponseLogps(
        policy=torch.tensor(policy),
        mask=torch.arange(3) < torch.tensor([3, 2, 3, 1])[:, None],
        pairs=torch.tensor([[0, 1], [3, 2]]),
        reference=torch.tensor(reference),
    )


def random_batch(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> ResponseLogps:
    """Four pairs over seven responses of 1 to 6 tokens: row 0 is in two pairs, rows are out of order."""
    generator = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return -torch.rand(7, 6, generator=generator, dtype=torch.float64).to(dtype) * 2

    mask = torch.arange(6) < torch.tensor([4, 6, 1, 2, 5, 3, 3])[:, None]
    return ResponseLogps(
        policy=torch.where(mask, logps(), 0.0),
        mask=mask,
        pairs=torch.tensor([[0, 1], [0, 3], [4, 2], [6, 5]]),
        reference=torch.where(mask, logps(), 0.0),
    )


def call(name: str, lp: ResponseLogps, **values: Any) -> ObjectiveOutput:
    """The objective's output; values go through its schema, so a test cannot use one a recipe may not."""
    return get_objective(name).fn(lp, **objective_schema(name)(**values).model_dump())


def per_pair(output: ObjectiveOutput) -> Tensor:
    """(P, 1 or 2): losses and, where there are any, token losses."""
    parts = [output.losses] if output.token_losses is None else [output.losses, output.token_losses]
    return torch.stack(parts, dim=-1)


def gradient(name: str, lp: ResponseLogps, **values: Any) -> Tensor:
    """(R, T) gradient of everything the objective returns for training, summed."""
    policy = lp.policy.clone().requires_grad_()
    per_pair(call(name, dataclasses.replace(lp, policy=policy), **values)).sum().backward()
    assert policy.grad is not None
    return policy.grad


def perturbed(name: str) -> dict[str, float]:
    """Every hyper-parameter moved off its default, all within bounds."""
    fields = get_objective(name).fields
    assert all(default is not ... for _, default in fields.values()), (
        f"{name} has a hyper-parameter without a default: give `perturbed` a value for it"
    )
    return {key: default * 1.5 + 0.1 for key, (_, default) in fields.items()}


def needs_reference(name: str) -> bool:
    return Need.REFERENCE in get_objective(name).needs


def positional_parameters(name: str) -> list[str]:
    parameters = inspect.signature(get_objective(name).fn).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
