"""DPO and the variants that keep its logistic link: robust, length-desensitised, DPO-Positive."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from prefopt.objectives._terms import (
    log_ratio_sums,
    logistic_loss,
    pair_margin,
    pair_output,
    response_sums,
)
from prefopt.recipe.registry import Need, objective
from prefopt.recipe.section import FlipProbability
from prefopt.types import ObjectiveOutput, ResponseLogps

Fraction = Annotated[float, Field(ge=0, le=1)]
NEEDS = frozenset({Need.PAIRS, Need.REFERENCE})


@objective("dpo", needs=NEEDS, source="arXiv:2305.18290 eq. 7; cDPO: ericmitchell.ai/cdpo.pdf")
def dpo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: FlipProbability = 0.0,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair DPO loss, in nats; conservative DPO (cDPO) with ``label_smoothing``.

        L = -(1-ε) log σ(β h) - ε log σ(-β h),
        h = [log π(y_w) - log π_ref(y_w)] - [log π(y_l) - log π_ref(y_l)], sums over tokens

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: strength of the implicit KL penalty, > 0. 0.1 in the paper; 0.01 in tuned chat recipes
            with long responses, because it multiplies a sum over tokens.
        label_smoothing: ε, assumed share of flipped labels, in [0, 0.5). TRL's ``sigmoid`` loss reads
            no label smoothing; use this where a recipe means cDPO.
        nll_weight: weight of the token-mean NLL of the chosen response (RPO/IRPO: 1).

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Mitchell 2023 (cDPO); NLL term:
        Pang et al. 2024, arXiv:2404.19733 (which normalises it per response).
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    losses = logistic_loss(pair_margin(rewards), label_smoothing)
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)


@objective("robust_dpo", needs=NEEDS, source="arXiv:2403.00409, the unbiased (rDPO) loss")
def robust_dpo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: FlipProbability = 0.1,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair robust DPO loss, in nats: unbiased for the DPO loss on clean labels.

        L = [-(1-ε) log σ(β h) + ε log σ(-β h)] / (1-2ε) = -log σ(β h) - ε/(1-2ε) β h

    Unlike cDPO, which pulls the margin back to log((1-ε)/ε), this pushes it further; the loss has no
    lower bound and can be negative.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: as in `dpo`.
        label_smoothing: ε, known share of flipped labels, in [0, 0.5). The default 0.1 is this
            project's, since at 0 (TRL's default) the loss is `dpo` exactly.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Chowdhury et al. 2024, arXiv:2403.00409; TRL's ``loss_type="robust"``.
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    margin = pair_margin(rewards)
    # ε < 1/2 by the schema, so the divisor is positive. The second form of the docstring has no
    # difference of two large log-sigmoids to cancel.
    losses = logistic_loss(margin) - label_smoothing / (1 - 2 * label_smoothing) * margin
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)


@objective("ld_dpo", needs=NEEDS, source="arXiv:2409.06411, with α on policy and reference")
def ld_dpo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    alpha: Fraction = 0.5,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair length-desensitised DPO loss, in nats; tokens past the shorter response weigh α.

        L = -log σ(β [r(y_w) - r(y_l)]),  l = min(|y_w|, |y_l|)
        r(y) = Σ_{t<=l} ρ_t + α Σ_{t>l} ρ_t,  ρ_t = log π(y_t) - log π_ref(y_t)

    α weighs policy and reference alike, so the implicit reward is 0 where policy = reference. TRL 1.16
    does this too; LLaMA-Factory, ms-swift and TRL 0.18 do `ld_dpo_policy_only`.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``mask`` and ``pairs`` (P, 2).
        beta: as in `dpo`.
        alpha: weight of the excess tokens, in [0, 1]. 1 is DPO, 0 ignores them; best values depend on
            the model (0.5 for Llama-3-8B-Instruct). TRL calls it ``ld_alpha``.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Liu et al. 2024, arXiv:2409.06411.
    """
    excess = _excess_sums(lp.log_ratio, lp)
    rewards = beta * (log_ratio_sums(lp)[lp.pairs] - (1 - alpha) * excess)  # (P, 2)
    return pair_output(lp, logistic_loss(pair_margin(rewards)), rewards, nll_weight=nll_weight)


@objective("ld_dpo_policy_only", needs=NEEDS, source="arXiv:2409.06411, with α on the policy only")
def ld_dpo_policy_only(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    alpha: Fraction = 0.5,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair LD-DPO loss as LLaMA-Factory, ms-swift and TRL 0.18 compute it, in nats.

        L = -log σ(β [r(y_w) - r(y_l)]),  l = min(|y_w|, |y_l|)
        r(y) = Σ_{t<=l} log π(y_t) + α Σ_{t>l} log π(y_t) - Σ_t log π_ref(y_t)

    Where policy = reference the margin is not 0 but β(1-α) times the (negated) excess log-prob, to the
    longer response's advantage; use it to reproduce such runs, and `ld_dpo` otherwise.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``mask`` and ``pairs`` (P, 2).
        beta: as in `dpo`.
        alpha: weight of the policy's excess tokens, in [0, 1]; 1 is DPO.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Liu et al. 2024, arXiv:2409.06411; the choice of reference is that of the codes named.
    """
    excess = _excess_sums(lp.policy, lp)
    rewards = beta * (log_ratio_sums(lp)[lp.pairs] - (1 - alpha) * excess)  # (P, 2)
    return pair_output(lp, logistic_loss(pair_margin(rewards)), rewards, nll_weight=nll_weight)


@objective("dpop", needs=NEEDS, source="arXiv:2402.13228, L_DPOP")
def dpop(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.3,
    dpop_lambda: NonNegativeFloat = 50.0,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair DPO-Positive loss, in nats: DPO that may not lower the chosen response.

        L = -log σ(β [ρ(y_w) - ρ(y_l) - λ max(0, -ρ(y_w))]),  ρ(y) = Σ_t log π(y_t) - log π_ref(y_t)

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: as in `dpo`. Default 0.3, which re-implementations quote for the Smaug models.
        dpop_lambda: λ, weight of the penalty on a chosen response below its reference, >= 0; 0 is DPO.
            Default 50, quoted with that β. It multiplies β ρ: one nat lost on the chosen response then
            costs 15 of margin, a wall rather than a slope; a smaller λ softens it.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`, whose rewards are β ρ without the penalty,
        comparable with `dpo`, and ``rewards/penalty`` = β λ max(0, -ρ(y_w)).
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Pal et al. 2024 (Smaug), arXiv:2402.13228, L_DPOP.
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    penalty = dpop_lambda * F.relu(-rewards[:, 0])
    losses = logistic_loss(pair_margin(rewards) - penalty)
    metrics = {"rewards/penalty": penalty.detach()}
    return pair_output(lp, losses, rewards, nll_weight=nll_weight, metrics=metrics)


def _excess_sums(values: Tensor, lp: ResponseLogps) -> Tensor:
    """(P, 2) sums of token values (R, T) past the length of the pair's shorter response.

    Worked out per pair and not per row: a response that is in several pairs has several common lengths.
    """
    mask = lp.mask[lp.pairs]  # (P, 2, T)
    position = mask.cumsum(-1)  # 1 at the first response token, wherever in the row it stands
    common = mask.sum(-1).amin(-1)  # (P,)
    return response_sums(values[lp.pairs], mask & (position > common[:, None, None]))
