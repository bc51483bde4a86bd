"""Importance weights of rollouts that an older policy sampled.

The weight of a pair is that of both its sampled sides together: the pair was drawn from the product of
their distributions. Truncation from above bounds the variance and leaves a bias (Ionides 2008; used for
rollouts as in arXiv:2506.21495's code, cap 2).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefopt.types import ObjectiveOutput, ResponseLogps


def log_importance(lp: ResponseLogps) -> Tensor:
    """(R,) detached Σ_t log π - log π_sampler of each sample, in nats; 0 on rows of a data set."""
    if lp.behavior is None or lp.samples is None:
        return lp.policy.new_zeros(len(lp.policy))
    gap = (lp.policy.detach() - lp.behavior) * lp.mask
    return gap.sum(-1) * lp.samples


def weighted(
    output: ObjectiveOutput, lp: ResponseLogps, cap: float
) -> tuple[ObjectiveOutput, Tensor]:
    """``output`` with every loss times min(cap, importance weight), and the weights (R,) of the samples.

    Args:
        cap: largest weight, > 0.
    """
    logs = log_importance(lp)
    limit = torch.tensor(cap).log().item()
    rows = logs.clamp(max=limit).exp()  # clamped before exp: no overflow
    pairs = logs[lp.pairs].sum(-1).clamp(max=limit).exp()
    return (
        replace(
            output,
            losses=output.losses * pairs,
            token_losses=None if output.token_losses is None else output.token_losses * pairs,
            sample_losses=None if output.sample_losses is None else output.sample_losses * rows,
            sample_token_losses=(
                None if output.sample_token_losses is None else output.sample_token_losses * rows
            ),
        ),
        rows,
    )
