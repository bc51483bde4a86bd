"""What the pairwise objectives share: reductions over response tokens, the logistic loss, the NLL term.

Numbers keep the dtype they come in (fp32 in training, fp64 under gradcheck). Positions outside the
mask are selected away, not multiplied by zero, so NaN or infinity there reaches neither loss nor
gradient.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.types import ObjectiveOutput, ResponseLogps

"""Share of pairs whose label is wrong. At one half a label says nothing, beyond it the opposite."""


def response_sums(values: Tensor, mask: Tensor) -> Tensor:
    """(R,) sums of token values (R, T) where ``mask`` (R, T) is True; leading dimensions are free."""
    return torch.where(mask, values, 0.0).sum(-1)


def response_means(values: Tensor, mask: Tensor) -> Tensor:
    """(R,) means of token values (R, T) over the tokens of each response; 0 for a row without any."""
    # Empty responses are rejected before training; the clamp keeps such a row from turning 0/0 into NaN.
    return response_sums(values, mask) / mask.sum(-1).clamp(min=1)


def log_ratio_sums(lp: ResponseLogps) -> Tensor:
    """(R,) sums over the response of log π - log π_ref, in nats."""
    return response_sums(lp.log_ratio, lp.mask)


def pair_margin(pair_values: Tensor) -> Tensor:
    """(P,) chosen minus rejected of (P, 2) values."""
    chosen, rejected = pair_values.unbind(-1)
    return chosen - rejected


def logistic_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(P,) values of -(1-ε) log σ(m) - ε log σ(-m), in nats.

    Computed as -log σ(m) + ε m, equal because log σ(m) - log σ(-m) = m. ``logsigmoid`` is stable for
    any finite m: it never takes the log of a rounded-to-zero probability.
    """
    return -F.logsigmoid(margin) + label_smoothing * margin


def chosen_nll(lp: ResponseLogps) -> Tensor:
    """(P,) sums of -log π over the tokens of each pair's chosen response, in nats."""
    return -response_sums(lp.policy, lp.mask)[lp.pairs[:, 0]]


def pair_output(
    lp: ResponseLogps,
    losses: Tensor,
    rewards: Tensor,
    *,
    nll_weight: float = 0.0,
    metrics: Mapping[str, Tensor] | None = None,
) -> ObjectiveOutput:
    """The output of a pairwise objective, with the metrics every one of them reports.

    The NLL term is a mean over the chosen tokens of the *global* batch, which the trainer takes: what
    TRL's CPO and ORPO and the SimPO code do within a micro-batch, made independent of the split.
    IRPO's paper averages per response first, which weighs the tokens of short responses more.

    Args:
        lp: the log-probs the objective was given.
        losses: (P,) unreduced, without the NLL term.
        rewards: (P, 2) implicit rewards of chosen and rejected; the metrics are made from these.
        nll_weight: factor on the NLL of the chosen response; at 0 it is not computed.
        metrics: further (P,) values to report.

    Returns: losses, ``token_losses`` (P,) if ``nll_weight`` > 0, and the metrics
        ``rewards/chosen|rejected|margin|accuracy`` and, with an NLL term, ``nll/chosen``.
    """
    named = _reward_metrics(rewards.detach()) | dict(metrics or {})
    if nll_weight == 0:
        return ObjectiveOutput(losses, named)
    nll = chosen_nll(lp)
    named["nll/chosen"] = per_chosen_token(lp, nll.detach())
    return ObjectiveOutput(losses, named, token_losses=nll_weight * nll)


def per_chosen_token(lp: ResponseLogps, values: Tensor) -> Tensor:
    """(P,) values divided by the token count of each pair's chosen response."""
    # At least 1, for the reason given in `response_means`.
    return values / lp.mask.sum(-1).clamp(min=1)[lp.pairs[:, 0]]


def _reward_metrics(rewards: Tensor) -> dict[str, Tensor]:
    chosen, rejected = rewards.unbind(-1)
    margin = chosen - rejected
    # A tie counts one half: at step 0 policy = reference, every reward is 0, and "chance" is what the
    # model knows about the order. A strict > (TRL) reads 0 there, as if every pair were inverted.
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/accuracy": 0.5 + 0.5 * margin.sign(),
    }
