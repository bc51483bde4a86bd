"""The hinge loss on DPO's margin: SLiC in its reference-normalised form."""

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._terms import log_ratio_sums, pair_margin, pair_output
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "hinge",
    needs={Need.PAIRS, Need.REFERENCE},
    source="arXiv:2305.10425 eq. 1 on log-ratios (arXiv:2309.06657, hinge-norm)",
)
def hinge(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, nll_weight: NonNegativeFloat = 0.0
) -> ObjectiveOutput:
    """Per-pair hinge loss on the DPO margin.

        L = max(0, 1 - β h),  h as in `dpo`

    A pair whose margin reaches 1/β nats has neither loss nor gradient.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T) and ``pairs`` (P, 2).
        beta: inverse of the target margin, > 0; SLiC's δ is 1/β here.
        nll_weight: weight of the token-mean NLL of the chosen response, the counterpart of SLiC's
            regularisation on its SFT targets.

    Returns: losses (P,), unreduced; metrics as `pair_output`.
    Raises: ValueError without a reference; a recipe that lacks one is refused when it is checked.
    Source: Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, eq. 1, which has no reference in the margin;
        normalised by it in Liu et al. 2023 (RSO), arXiv:2309.06657; TRL's ``loss_type="hinge"``.
    """
    rewards = beta * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    losses = F.relu(1 - pair_margin(rewards))
    return pair_output(lp, losses, rewards, nll_weight=nll_weight)
