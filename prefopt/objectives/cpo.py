"""CPO: DPO's loss without the reference, and NLL on the chosen response to stay near the data."""

from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._terms import (
    logistic_loss,
    pair_margin,
    pair_output,
    response_sums,
)
from prefopt.recipe.registry import Need, objective
from prefopt.recipe.section import FlipProbability
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective("cpo", needs={Need.PAIRS}, source="arXiv:2401.08417, L_prefer + L_NLL")
def cpo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: FlipProbability = 0.0,
    nll_weight: NonNegativeFloat = 1.0,
) -> ObjectiveOutput:
    """Per-pair CPO loss, in nats: a reference-free DPO loss plus the NLL of the chosen response.

        L = -(1-ε) log σ(m) - ε log σ(-m) + w NLL(y_w),  m = β [log π(y_w) - log π(y_l)], sums over tokens

    Args:
        lp: token log-probs. Uses ``policy`` (R, T) and ``pairs`` (P, 2); ignores ``reference``.
        beta: inverse temperature, > 0.
        label_smoothing: ε, assumed share of flipped labels, in [0, 0.5).
        nll_weight: w, weight of the token-mean NLL, part of the method (1 in the paper). TRL's
            ``cpo_alpha``.

    Returns: losses (P,), unreduced; ``token_losses`` (P,) where ``nll_weight`` > 0; metrics as `pair_output`.
    Raises: nothing.
    Source: Xu et al. 2024, arXiv:2401.08417, L_prefer + L_NLL; TRL's CPOTrainer, ``loss_type="sigmoid"``.
    """
    rewards = beta * response_sums(lp.policy, lp.mask)[lp.pairs]  # (P, 2)
    losses = logistic_loss(pair_margin(rewards), label_smoothing)
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)
