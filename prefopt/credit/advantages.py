"""Rules that turn the scores of a group into advantages, one a response.

A group whose scores are all equal has no advantage and, without a KL term, no gradient. It is skipped as
``tie`` unless ``keep_degenerate`` asks for zeros, which count in the mean over samples (as in TRL) and
keep the objective's KL term on them.
"""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat

from prefopt.credit.base import GroupScores, Labels
from prefopt.recipe.registry import Need, credit

_ADVANTAGES = frozenset({Need.ADVANTAGES})


@credit("group_mean", gives=_ADVANTAGES, source="arXiv:2503.20783 (Dr. GRPO); arXiv:2506.21495")
def group_mean(scores: GroupScores, *, keep_degenerate: bool = False) -> Labels:
    """Advantages r_i - mean(r), in the units of the reward.

    Args:
        scores: of one group.
        keep_degenerate: give a group of equal scores zeros instead of skipping it.

    Returns: one advantage a response, or skipped as ``tie``.
    Source: Liu et al. 2025, arXiv:2503.20783; the text of arXiv:2506.21495.
    """
    if _is_degenerate(scores):
        return _no_signal(scores, keep_degenerate)
    return Labels(advantages=_centred(scores))


@credit("group_mean_std", gives=_ADVANTAGES, source="arXiv:2402.03300 (GRPO)")
def group_mean_std(
    scores: GroupScores, *, epsilon: NonNegativeFloat = 1e-6, keep_degenerate: bool = False
) -> Labels:
    """Advantages (r_i - mean(r)) / (std(r) + ε), without units; std with G - 1, as in the codes below.

    Dividing by the standard deviation gives prompts that are almost always or almost never solved the
    weight of balanced ones; `group_mean` does not.

    Args:
        scores: of one group.
        epsilon: ε, in the units of the reward. 1e-6 is fairseq2's (arXiv:2506.21495); TRL adds 1e-4,
            understand-r1-zero's GRPO 1e-8. It matters where rewards differ by noise only.
        keep_degenerate: as in `group_mean`.

    Returns: one advantage a response, or skipped as ``tie``.
    Source: Shao et al. 2024, arXiv:2402.03300.
    """
    if _is_degenerate(scores):
        return _no_signal(scores, keep_degenerate)
    centred = _centred(scores)
    # At least two scores differ, so the variance is positive and G >= 2.
    std = math.sqrt(math.fsum(value * value for value in centred) / (len(centred) - 1))
    return Labels(advantages=tuple(value / (std + epsilon) for value in centred))


@credit("leave_one_out", gives=_ADVANTAGES, source="arXiv:2402.14740 (RLOO)")
def leave_one_out(scores: GroupScores, *, keep_degenerate: bool = False) -> Labels:
    """Advantages r_i - mean of the other scores = G/(G-1) (r_i - mean(r)).

    The baseline of a response does not depend on it, so the gradient is unbiased.

    Args:
        scores: of one group.
        keep_degenerate: as in `group_mean`.

    Returns: one advantage a response, or skipped as ``tie``; a group of one has no others and is a tie.
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """
    if _is_degenerate(scores):
        return _no_signal(scores, keep_degenerate)
    centred = _centred(scores)
    factor = len(centred) / (len(centred) - 1)
    return Labels(advantages=tuple(factor * value for value in centred))


@credit("none", gives=frozenset(), source="unlabelled samples, e.g. arXiv:2406.01462 (HyPO)")
def none(scores: GroupScores) -> Labels:
    """No labels: every sample is kept for an objective that needs no reward, such as `hypo`.

    Args:
        scores: not used.

    Returns: neither pairs nor advantages, and nothing skipped.
    """
    del scores
    return Labels()


def _is_degenerate(scores: GroupScores) -> bool:
    return max(scores.rewards) == min(scores.rewards)


def _no_signal(scores: GroupScores, keep: bool) -> Labels:
    return Labels(advantages=(0.0,) * len(scores.rewards)) if keep else Labels(skipped="tie")


def _centred(scores: GroupScores) -> tuple[float, ...]:
    mean = math.fsum(scores.rewards) / len(scores.rewards)
    return tuple(reward - mean for reward in scores.rewards)
