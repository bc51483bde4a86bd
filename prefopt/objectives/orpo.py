"""ORPO: SFT on the chosen response plus an odds-ratio penalty, no reference."""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from prefopt.objectives._terms import pair_margin, pair_output, response_means
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective("orpo", needs={Need.PAIRS}, source="arXiv:2403.07691 eqs. 6 and 7")
def orpo(lp: ResponseLogps, *, beta: PositiveFloat = 0.1) -> ObjectiveOutput:
    """Per-pair ORPO loss, in nats: NLL of the chosen response plus β times the odds-ratio loss.

        L = NLL(y_w) - β log σ(log odds(y_w) - log odds(y_l)),  odds(y) = p/(1-p), p = exp(mean_t log π(y_t))

    The NLL has weight 1, and ``beta`` weighs the other term against it: a weight on both would be a
    learning rate. It covers the response only; TRL's covers the prompt too.

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``mask`` and ``pairs`` (P, 2); ignores ``reference``.
        beta: the paper's λ, > 0; TRL calls it ``beta``. It stands outside the sigmoid.

    Returns: losses (P,) of the odds-ratio term, unreduced; ``token_losses`` (P,) of the NLL; metrics as
        `pair_output`, with rewards β mean_t log π (TRL's), which order a pair as its odds do.
    Raises: nothing.
    Source: Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7.
    """
    mean_logps = response_means(lp.policy, lp.mask)[lp.pairs]  # (P, 2)
    log_odds = _log_odds(mean_logps)
    losses = -beta * F.logsigmoid(pair_margin(log_odds))
    return pair_output(lp, losses, beta * mean_logps, nll_weight=1.0)


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1-p) of ``logp`` = log p <= 0, any shape; finite, with finite gradients.

    ``expm1`` keeps 1-p exact near p = 1, where 1 - exp(log p) loses its digits. Far from it 1-p rounds to
    1 and its log to 0, which is right to an absolute 1e-7 beside a log p of order 1: no second branch for
    small p is needed, and so no ``where``, which would turn an infinite gradient of the branch it drops
    into NaN (as the gradient of TRL's two-branch ``log1mexp`` is at log p = -1e-8).
    """
    # p = 1, as fp32 rounds a memorised response, has infinite odds. One machine epsilon below is as close
    # as the dtype can tell apart; it bounds the log-odds (by 16 in fp32) and the gradient (by 1/epsilon).
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
