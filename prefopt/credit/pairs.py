"""Rules that pick pairs from a scored group.

One tie policy for all of them: a response is rejected for another only if it scores lower by more than the
margin, and never for one with the same tokens. Where nothing is left, the group is skipped as ``tie`` or
``duplicate`` and counted; no rule trains on chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pydantic import NonNegativeFloat, PositiveInt

from prefopt.credit.base import GroupScores, Labels
from prefopt.recipe.registry import Need, credit

_PAIRS = frozenset({Need.PAIRS})


@credit("best_worst", gives=_PAIRS, source="arXiv:2506.21495 (non-verifiable), arXiv:2410.18252")
def best_worst(
    scores: GroupScores, *, min_margin: NonNegativeFloat = 0.0, reject_longest: bool = False
) -> Labels:
    """One pair: the highest score against the lowest.

    Args:
        scores: of one group. The first of equal scores is taken; samples are i.i.d., so that is a fair draw.
        min_margin: how much lower the rejected score must be, in the units of the reward; it must be
            lower by more than this. 0 skips ties and nothing else.
        reject_longest: reject the longest response of those that score lower, in tokens, instead of the
            worst one: against a reward model that likes length. The paper's code takes the longest of all
            others, ties included.

    Returns: one pair, or skipped as ``tie`` or ``duplicate``.
    Source: Lanchantin et al. 2025, arXiv:2506.21495, non-verifiable tasks; Noukhovitch et al. 2024,
        arXiv:2410.18252, with K samples.
    """
    if reject_longest:
        return _best_against(scores, min_margin, lambda lower: _longest(scores, lower))
    return _best_against(scores, min_margin, lambda lower: _worst(scores, lower))


@credit(
    "best_random",
    gives=_PAIRS,
    source="a pair rule of HALOs and OpenRLHF",
)
def best_random(scores: GroupScores, *, min_margin: NonNegativeFloat = 0.0) -> Labels:
    """One pair: the highest score against one drawn evenly from those that score lower.

    A milder contrast than `best_worst`, whose rejected side drifts to what is only malformed as groups grow.

    Args:
        scores: of one group; ``rng`` makes the draw, so a resumed run draws the same.
        min_margin: as in `best_worst`.

    Returns: one pair, or skipped as ``tie`` or ``duplicate``.
    Source: one of the pair rules of HALOs and OpenRLHF.
    """
    return _best_against(scores, min_margin, scores.rng.choice)


@credit("first_right_wrong", gives=_PAIRS, source="arXiv:2506.21495 (verifiable)")
def first_right_wrong(scores: GroupScores, *, threshold: float = 0.5) -> Labels:
    """One pair: the first right response against the first wrong one. For verifiers.

    Args:
        scores: of one group. The first is as good as a random one: samples are i.i.d.
        threshold: a score above it is right. 0.5 fits scores of 0 and 1; with penalties in the sum of
            signals, put it where right and wrong part.

    Returns: one pair, or skipped as ``all_right`` or ``all_wrong`` (or ``duplicate``, if the verifier
        contradicts itself).
    Source: Lanchantin et al. 2025, arXiv:2506.21495, verifiable tasks.
    """
    right = [i for i, reward in enumerate(scores.rewards) if reward > threshold]
    wrong = [i for i, reward in enumerate(scores.rewards) if not reward > threshold]
    if not wrong:
        return Labels(skipped="all_right")
    if not right:
        return Labels(skipped="all_wrong")
    distinct = _distinct(scores, right[0], wrong)
    return Labels(pairs=((right[0], distinct[0]),)) if distinct else Labels(skipped="duplicate")


@credit("all_pairs", gives=_PAIRS, source="arXiv:2506.21495 eq. 4 (GroupDPO)")
def all_pairs(
    scores: GroupScores, *, margin: NonNegativeFloat = 0.0, max_pairs: PositiveInt | None = None
) -> Labels:
    """Every pair whose scores are more than ``margin`` apart; with scores of 0 and 1, right × wrong.

    Every pair of a batch weighs the same, since the trainer divides by their number. GroupDPO's eq. 4 takes
    the mean within each group first, which gives a group that splits 7:1 (7 pairs) the weight of one that
    splits 4:4 (16 pairs). ``max_pairs: 1`` draws one pair a group evenly: its expectation is eq. 4.

    Args:
        scores: of one group.
        margin: how much the two scores must differ: by more than this, in the units of the reward.
        max_pairs: most pairs of one group; of more, this many are drawn evenly without replacement.
            Default: all, up to G²/4 for verifiers and G(G-1)/2 for real-valued rewards. They share the
            forward of their G responses, so more pairs cost next to nothing.

    Returns: the pairs in row order, or skipped as ``tie`` or ``duplicate``.
    Source: Lanchantin et al. 2025, arXiv:2506.21495, eq. 4, and fairseq2's _group_dpo.py.
    """
    rows = range(len(scores.rewards))
    apart = [(i, j) for i in rows for j in _lower(scores, i, margin)]
    if not apart:
        return Labels(skipped="tie")
    pairs = [(i, j) for i, j in apart if scores.ids[i] != scores.ids[j]]
    if not pairs:
        return Labels(skipped="duplicate")
    if max_pairs is not None and len(pairs) > max_pairs:
        pairs = sorted(scores.rng.sample(pairs, max_pairs))
    return Labels(pairs=tuple(pairs))


@credit("sopo", gives=_PAIRS, needs_offline=True, source="arXiv:2412.05095 (D_SoPo)")
def sopo(scores: GroupScores) -> Labels:
    """One pair: the data set's response against the worst sample.

    The data set's response is preferred by decree, whatever it scores; the threshold of the objective
    `sopo` is what drops the rejected side where even the worst sample is good. So nothing is a tie here.

    Args:
        scores: of one group, with ``offline`` the index of the data set's response.

    Returns: one pair; skipped as ``no_offline`` where the row has no response, or ``duplicate`` where the
        policy sampled nothing but that response.
    Source: Tan et al. 2024, arXiv:2412.05095: x^w from the data, x^l = argmin_k r(x^k).
    """
    if scores.offline is None:
        return Labels(skipped="no_offline")
    samples = [i for i in range(len(scores.rewards)) if i != scores.offline]
    distinct = _distinct(scores, scores.offline, samples)
    if not distinct:
        return Labels(skipped="duplicate")
    return Labels(pairs=((scores.offline, _worst(scores, distinct)),))


def _best_against(
    scores: GroupScores, margin: float, pick: Callable[[Sequence[int]], int]
) -> Labels:
    """The first best response, against the one that ``pick`` takes of those it may be chosen over."""
    best = max(range(len(scores.rewards)), key=scores.rewards.__getitem__)
    lower = _lower(scores, best, margin)
    if not lower:
        return Labels(skipped="tie")
    distinct = _distinct(scores, best, lower)
    return Labels(pairs=((best, pick(distinct)),)) if distinct else Labels(skipped="duplicate")


def _lower(scores: GroupScores, row: int, margin: float) -> list[int]:
    """Rows that score lower than ``row`` by more than ``margin``."""
    return [i for i, reward in enumerate(scores.rewards) if scores.rewards[row] - reward > margin]


def _distinct(scores: GroupScores, row: int, others: Iterable[int]) -> list[int]:
    """Those of ``others`` whose tokens are not those of ``row``: a pair of equals has no gradient."""
    return [i for i in others if scores.ids[i] != scores.ids[row]]


def _worst(scores: GroupScores, rows: Sequence[int]) -> int:
    return min(rows, key=scores.rewards.__getitem__)


def _longest(scores: GroupScores, rows: Sequence[int]) -> int:
    return max(rows, key=lambda row: len(scores.ids[row]))
