"""IPO in its two conventions: summed log-ratios (the paper's formula) and per-token means (TRL's)."""

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from prefopt.objectives._terms import log_ratio_sums, pair_margin, pair_output, response_means
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps

NEEDS = frozenset({Need.PAIRS, Need.REFERENCE})


@objective("ipo", needs=NEEDS, source="arXiv:2310.12036 eq. 17")
def ipo(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, nll_weight: NonNegativeFloat = 0.0
) -> ObjectiveOutput:
    """Per-pair IPO loss on summed log-ratios, in nats squared.

        L = (h - 1/(2β))²,  h as in `dpo`, sums over tokens

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: the paper's τ, > 0. The target margin is 1/(2β) nats over the whole response: 5 at 0.1.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; the DPO authors' code. TRL, LLaMA-Factory and
        oat compute `ipo_mean` under this name: a β is not transferable between the two.
    """
    log_ratios = log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    losses = _squared_distance(log_ratios, beta)
    return pair_output(lp, losses, beta * log_ratios, nll_weight=nll_weight)


@objective("ipo_mean", needs=NEEDS, source="arXiv:2310.12036 eq. 17 on per-token means, as TRL")
def ipo_mean(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, nll_weight: NonNegativeFloat = 0.0
) -> ObjectiveOutput:
    """Per-pair IPO loss on per-token mean log-ratios, in nats squared.

        L = (h - 1/(2β))²,  h = mean_t ρ_t(y_w) - mean_t ρ_t(y_l),  ρ_t = log π(y_t) - log π_ref(y_t)

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``mask`` and ``pairs`` (P, 2).
        beta: the paper's τ, > 0. The target margin is 1/(2β) nats per token: 5 at TRL's default 0.1,
            out of reach in practice, and 1 at 0.5.
        nll_weight: weight of the token-mean NLL of the chosen response; not part of the paper.

    Returns: losses (P,), unreduced; metrics as `pair_output`, with rewards β times the mean log-ratio
        (TRL logs β times the sum).
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17, normalised as TRL's ``loss_type="ipo"``, whose
        comment says that the authors confirm it.
    """
    log_ratios = response_means(lp.log_ratio, lp.mask)[lp.pairs]  # (P, 2)
    losses = _squared_distance(log_ratios, beta)
    return pair_output(lp, losses, beta * log_ratios, nll_weight=nll_weight)


def _squared_distance(log_ratios: Tensor, beta: float) -> Tensor:
    """(P,) squared distance of the pair margin from its target 1/(2β)."""
    return (pair_margin(log_ratios) - 1 / (2 * beta)) ** 2  # β > 0 by the schema
