"""SimPO: length-normalised log-probs as the reward, a target margin, no reference."""

from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._terms import (
    logistic_loss,
    pair_margin,
    pair_output,
    response_means,
)
from prefopt.recipe.registry import Need, objective
from prefopt.recipe.section import FlipProbability
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective("simpo", needs={Need.PAIRS}, source="arXiv:2405.14734 eq. 6")
def simpo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 2.0,
    gamma: NonNegativeFloat = 1.0,
    label_smoothing: FlipProbability = 0.0,
    nll_weight: NonNegativeFloat = 0.0,
) -> ObjectiveOutput:
    """Per-pair SimPO loss, in nats.

        L = -(1-ε) log σ(m) - ε log σ(-m),  m = β (mean_t log π(y_w) - mean_t log π(y_l)) - γ

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``mask`` and ``pairs`` (P, 2); ignores ``reference``.
        beta: inverse temperature on the mean log-prob, > 0. Typical 2-10: larger than DPO's because it
            multiplies a mean, not a sum.
        gamma: target margin, in the units of the β-scaled reward, >= 0. The default is the paper's
            γ/β = 0.5 at β = 2. Same γ as TRL's ``simpo_gamma``; the authors' code, HALOs and oat take γ/β.
        label_smoothing: ε, as the authors' code has it, in [0, 0.5).
        nll_weight: weight of the token-mean NLL of the chosen response. 0 in the paper; the authors'
            ``sft_weight``, TRL's ``cpo_alpha``, which is 1 unless set to 0 (CPO-SimPO).

    Returns: losses (P,), unreduced; metrics as `pair_output`, with rewards β mean_t log π, γ not in them.
    Raises: nothing.
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    rewards = beta * response_means(lp.policy, lp.mask)[lp.pairs]  # (P, 2)
    losses = logistic_loss(pair_margin(rewards) - gamma, label_smoothing)
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)
