"""Anchored preference optimisation: the pair is anchored to the reference, up or down."""

from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._terms import log_ratio_sums, pair_output
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps

NEEDS = frozenset({Need.PAIRS, Need.REFERENCE})


@objective("apo_zero", needs=NEEDS, source="arXiv:2408.06266 eq. 7")
def apo_zero(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, nll_weight: NonNegativeFloat = 0.0
) -> ObjectiveOutput:
    """Per-pair APO-zero loss, in [0, 2]: chosen above the reference, rejected below it.

        L = σ(-β ρ(y_w)) + σ(β ρ(y_l)),  ρ(y) = Σ_t log π(y_t) - log π_ref(y_t)

    For data whose chosen responses are better than what the model would write.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: scale of the log-ratio, > 0.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7; TRL's ``loss_type="apo_zero"``.
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    chosen, rejected = rewards.unbind(-1)
    # σ(-x) and not 1 - σ(x), which rounds to 0 in fp32 once x passes 17.
    losses = (-chosen).sigmoid() + rejected.sigmoid()
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)


@objective("apo_down", needs=NEEDS, source="arXiv:2408.06266 eq. 8")
def apo_down(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, nll_weight: NonNegativeFloat = 0.0
) -> ObjectiveOutput:
    """Per-pair APO-down loss, in [0, 2]: both responses down, the rejected one further.

        L = σ(β ρ(y_w)) + σ(-β [ρ(y_w) - ρ(y_l)]),  ρ(y) = Σ_t log π(y_t) - log π_ref(y_t)

    For data whose chosen responses are worse than what the model would write; an NLL term pulls the
    other way.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: scale of the log-ratio, > 0.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8; TRL's ``loss_type="apo_down"``.
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    chosen, rejected = rewards.unbind(-1)
    losses = chosen.sigmoid() + (rejected - chosen).sigmoid()
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)
