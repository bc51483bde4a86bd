"""GRPO and Dr. GRPO: clipped policy gradients a token, baselined by the group. Online baselines."""

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from prefopt.objectives._samples import (
    clipped_surrogate,
    importance_ratio,
    is_clipped,
    k3,
    on_rows,
    on_tokens,
    sample_output,
    sampled_tokens,
    token_mean,
)
from prefopt.objectives._terms import response_sums
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps

_NEEDS = frozenset({Need.SAMPLES, Need.ADVANTAGES, Need.BEHAVIOR})
_WHEN = {"beta": Need.REFERENCE}


@objective(
    "grpo",
    needs=_NEEDS,
    needs_when=_WHEN,
    credit="group_mean_std",
    source="arXiv:2402.03300; two-sided clip: arXiv:2503.14476",
)
def grpo(
    lp: ResponseLogps,
    *,
    epsilon_low: PositiveFloat = 0.2,
    epsilon_high: PositiveFloat = 0.2,
    beta: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-response GRPO loss: the mean over its tokens of the clipped surrogate and the KL term.

        L_i = 1/|y_i| Σ_t [ -min(ρ_t A_i, clip(ρ_t, 1-ε_low, 1+ε_high) A_i) + β k3_t ]
        ρ_t = π(y_t) / π_sampler(y_t),  k3_t = e^(d_t) - d_t - 1,  d_t = log π_ref(y_t) - log π(y_t)

    The mean over tokens makes a long wrong response cost less a token than a short one; `dr_grpo` does not
    take it. ρ is against the log-probs the sampler stored, so that it corrects both for staleness and for
    the gap between trainer and engine; codes that run strictly on-policy put 1 there with the gradient of ρ.

    k3 estimates the reverse KL(π ‖ π_ref), but on-policy its gradient is on average that of the forward
    KL(π_ref ‖ π): it holds the policy on what the reference says. TRL 1.16 by default multiplies k3 by ρ,
    which makes it the reverse KL's; the paper and arXiv:2506.21495 do not, nor does this.

    Args:
        lp: token log-probs. Uses ``policy``, ``behavior`` (R, T), ``advantages`` and ``samples`` (R,), and
            with β > 0 ``reference`` (R, T).
        epsilon_low: lower clip of the ratio, > 0: binds where A < 0. 1 or more never clips.
        epsilon_high: upper clip of the ratio, > 0: binds where A > 0. DAPO raises it to 0.28.
        beta: weight of the KL to the reference, >= 0; 0 needs no reference. TRL's default; 0.001 in
            arXiv:2506.21495.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics ``ratio/mean`` and
        ``ratio/clipped_frac`` over the tokens of a response and, with β > 0, ``kl/k3_per_token``.
    Raises: ValueError for samples without log-probs of their sampler, advantages or (β > 0) a reference.
    Source: Shao et al. 2024, arXiv:2402.03300; Yu et al. 2025, arXiv:2503.14476 (ε_low, ε_high); the same
        as TRL's ``loss_type="grpo"`` with ``use_bias_correction_kl=False``.
    """
    losses, metrics = _token_losses(lp, epsilon_low, epsilon_high, beta)
    return sample_output(lp, token_mean(lp, losses), metrics)


@objective(
    "dr_grpo", needs=_NEEDS, needs_when=_WHEN, credit="group_mean", source="arXiv:2503.20783"
)
def dr_grpo(
    lp: ResponseLogps,
    *,
    max_tokens: PositiveInt,
    epsilon_low: PositiveFloat = 0.2,
    epsilon_high: PositiveFloat = 0.2,
    beta: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-response Dr. GRPO loss: as `grpo`, but a sum over tokens divided by a constant.

        L_i = 1/max_tokens Σ_t [ -min(ρ_t A_i, clip(ρ_t, 1-ε_low, 1+ε_high) A_i) + β k3_t ]

    Every token weighs the same, whatever response it is in: no bias by length. Goes with advantages that
    are not divided by the standard deviation (the credit `group_mean`).

    Args:
        lp: as in `grpo`.
        max_tokens: the constant, in tokens: ``regime.max_new_tokens`` in the paper's code and TRL. It only
            scales the loss, and so trades off with the learning rate and ``max_grad_norm``.
        epsilon_low: as in `grpo`.
        epsilon_high: as in `grpo`.
        beta: as in `grpo`; the paper has no KL term, TRL allows one.

    Returns: as `grpo`.
    Raises: as `grpo`.
    Source: Liu et al. 2025, arXiv:2503.20783; the same as TRL's ``loss_type="dr_grpo"``, but for the KL as
        in `grpo`. With ``max_tokens: 1`` it is the unnormalised sum of arXiv:2506.21495, eq. 1.
    """
    losses, metrics = _token_losses(lp, epsilon_low, epsilon_high, beta)
    return sample_output(lp, response_sums(losses, sampled_tokens(lp)) / max_tokens, metrics)


def _token_losses(
    lp: ResponseLogps, low: float, high: float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(R, T) clipped surrogate plus KL term, and the metrics (R,)."""
    policy = on_tokens(lp, lp.policy, Need.SAMPLES)
    ratios = importance_ratio(
        policy - on_tokens(lp, lp.behavior, Need.BEHAVIOR)
    )  # (R, T), 1 off the samples
    advantages = on_rows(lp, lp.advantages, Need.ADVANTAGES)[:, None]  # (R, 1)
    losses = clipped_surrogate(ratios, advantages, low, high)
    clipped = is_clipped(ratios, advantages, low, high).to(ratios.dtype)
    metrics = {
        "ratio/mean": token_mean(lp, ratios),
        "ratio/clipped_frac": token_mean(lp, clipped),
    }
    if beta > 0:
        kl = k3(policy, on_tokens(lp, lp.reference, Need.REFERENCE))
        losses = losses + beta * kl
        metrics["kl/k3_per_token"] = token_mean(lp, kl)
    return losses, metrics
