"""What the objectives on samples share: values of sampled rows only, ratios to the sampler, baselines.

Rows that are no samples are set to zero before anything is exponentiated or multiplied: they get exactly
zero loss and gradient, whatever stands in them, and so does a filler batch in which no row counts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from prefopt.objectives._terms import response_means, response_sums
from prefopt.recipe.registry import Need
from prefopt.types import ObjectiveOutput, ResponseLogps

# exp of this is 5e8. Sampled tokens come near it only where policy and sampler have nothing in common;
# beyond it fp32 would overflow and inf · 0 in the backward pass be NaN.
_MAX_LOG_RATIO = 20.0


def sampled_tokens(lp: ResponseLogps) -> Tensor:
    """(R, T) bool, True on the tokens of samples."""
    if lp.samples is None:
        return torch.zeros_like(lp.mask)
    return lp.mask & lp.samples[:, None]


def on_tokens(lp: ResponseLogps, values: Tensor | None, need: Need) -> Tensor:
    """(R, T) ``values`` on the tokens of samples, 0 elsewhere.

    Raises: ValueError if there are samples and no values: the objective did not declare ``need``.
    """
    return torch.where(sampled_tokens(lp), _given(lp, values, need, like=lp.policy), 0.0)


def on_rows(lp: ResponseLogps, values: Tensor | None, need: Need) -> Tensor:
    """(R,) ``values`` on samples, 0 on other rows.

    Raises: as `on_tokens`.
    """
    values = _given(lp, values, need, like=lp.policy[:, 0])
    return torch.zeros_like(values) if lp.samples is None else torch.where(lp.samples, values, 0.0)


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """π / π_sampler of its log, bounded from above (without gradient there) so that it stays finite."""
    return log_ratio.clamp(max=_MAX_LOG_RATIO).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - low, 1 + high) A): no gain from moving further than the clip range."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Bool, True where `clipped_surrogate` has no gradient."""
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(π ‖ π_ref) a token, never negative: e^d - d - 1, d = log π_ref - log π."""
    gap = (reference - policy).clamp(max=_MAX_LOG_RATIO)
    # expm1, because e^d - 1 of a small d has no digits left in fp32.
    return gap.expm1() - gap


def minus_others(lp: ResponseLogps, values: Tensor) -> Tensor:
    """(R,) values minus the mean of the other samples of the same group; a lone sample keeps its value.

    Linear in ``values``, so it may be applied to the terms of a reward one by one.
    Raises: ValueError if there are samples and no groups.
    """
    if lp.samples is None:
        return values
    group = _given(lp, lp.group, Need.GROUPS, like=values)
    others = (group[:, None] == group) & lp.samples  # (R, R)
    others = others & ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    # A sum and not a matrix product, which CUDA may take in TF32.
    total = torch.where(others, values, 0.0).sum(-1)
    baseline = total / others.sum(-1).clamp(min=1)
    return torch.where(lp.samples, values - baseline, 0.0)


def sample_output(
    lp: ResponseLogps,
    losses: Tensor,
    metrics: Mapping[str, Tensor],
    *,
    token_mean: bool = False,
) -> ObjectiveOutput:
    """The output of an objective without pairs: ``sample_losses`` (R,), metrics detached.

    Args:
        token_mean: the losses are sums over tokens whose mean over the tokens of the batch is wanted, and not over
            its responses: they are ``sample_token_losses`` then.
    """
    return ObjectiveOutput(
        losses=lp.policy.new_zeros(len(lp.pairs)),
        sample_losses=None if token_mean else losses,
        sample_token_losses=losses if token_mean else None,
        sample_metrics={name: value.detach() for name, value in metrics.items()},
    )


def sample_nll(lp: ResponseLogps) -> Tensor:
    """(R,) sums of -log π over the tokens of each sample, in nats; 0 on other rows."""
    return -response_sums(lp.policy, sampled_tokens(lp))


def weighted_output(
    lp: ResponseLogps,
    weights: Tensor,
    *,
    losses: Tensor | None = None,
    token_mean: bool = False,
    metrics: Mapping[str, Tensor] | None = None,
) -> ObjectiveOutput:
    """The output of a loss w · NLL, with what is logged of its weights.

    Args:
        weights: (R,), 0 on rows that are no samples. Detached here: a weight is a number and not a path for
            gradients.
        losses: (R,) where it is not w · NLL but holds more, or weighs tokens.
        token_mean: as in `sample_output`.
        metrics: further (R,) values to report.

    Returns: the losses and the metrics ``weights/mean``, ``weights/positive_frac`` and ``weights/square``, of
        which the trainer makes ``weights/effective_frac``.
    """
    weights = weights.detach()
    named = {
        "weights/mean": weights,
        "weights/square": weights**2,
        "weights/positive_frac": (weights > 0).to(weights.dtype),
        **(metrics or {}),
    }
    losses = weights * sample_nll(lp) if losses is None else losses
    return sample_output(lp, losses, named, token_mean=token_mean)


def token_mean(lp: ResponseLogps, values: Tensor) -> Tensor:
    """(R,) means over the tokens of each sample, 0 on other rows."""
    return response_means(values, sampled_tokens(lp))


def _given(lp: ResponseLogps, values: Tensor | None, need: Need, *, like: Tensor) -> Tensor:
    if values is not None:
        return values
    if lp.samples is None:
        return torch.zeros_like(like)  # nothing was sampled, so nothing is asked for
    raise ValueError(
        f"no {need.value} for the samples: declare needs={{Need.{need.name}}} on the objective"
    )
