"""Credit rules on groups small enough to label by eye."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest
from pydantic import ConfigDict, ValidationError, create_model

from prefopt.credit.advantages import group_mean, group_mean_std, leave_one_out, none
from prefopt.credit.base import GroupScores, Labels
from prefopt.credit.pairs import all_pairs, best_random, best_worst, first_right_wrong, sopo
from prefopt.recipe.registry import CREDITS, Need, get_credit

NAMES = sorted(CREDITS)
ADVANTAGES = [name for name in NAMES if get_credit(name).gives == {Need.ADVANTAGES}]
PAIRS = [name for name in NAMES if get_credit(name).gives == {Need.PAIRS}]
ONLINE_PAIRS = [name for name in PAIRS if not get_credit(name).needs_offline]


def group(
    *rewards: float, texts: str = "", offline: int | None = None, seed: int = 0
) -> GroupScores:
    """Responses with these scores, all different unless ``texts`` ("aab") says which are equal."""
    ids = tuple((ord(text),) for text in texts) or tuple((row,) for row in range(len(rewards)))
    return GroupScores(rewards=rewards, ids=ids, rng=random.Random(seed), offline=offline)


def pair(chosen: int, rejected: int) -> Labels:
    return Labels(pairs=((chosen, rejected),))


# --- pairs ---------------------------------------------------------------------------------------


def test_best_worst_takes_the_extremes_and_the_first_of_equals() -> None:
    assert best_worst(group(0.2, 0.9, -1.0, 0.5)) == pair(1, 2)
    assert best_worst(group(0.0, 1.0, 0.0, 1.0)) == pair(1, 0)


def test_a_margin_must_be_exceeded_not_met() -> None:
    assert best_worst(group(1.0, 0.5), min_margin=0.5) == Labels(skipped="tie")
    assert best_worst(group(1.0, 0.49), min_margin=0.5) == pair(0, 1)
    assert best_random(group(1.0, 0.5), min_margin=0.5) == Labels(skipped="tie")
    assert all_pairs(group(1.0, 0.5, 0.0), margin=0.5) == pair(0, 2)


def test_reject_longest_takes_the_longest_of_the_lower_and_never_a_tie() -> None:
    """Row 2 is longest and as good as the best; row 3 is the longest that scored lower; row 1 the worst."""
    scores = dataclasses.replace(
        group(1.0, 0.0, 1.0, 0.5), ids=((1,), (2, 2), (3, 3, 3, 3), (4, 4, 4))
    )
    assert best_worst(scores, reject_longest=True) == pair(0, 3)
    assert best_worst(scores) == pair(0, 1)


def test_best_random_draws_evenly_from_what_scored_lower() -> None:
    """Four lower rows in 4000 draws: 1000 each, standard deviation 27."""
    drawn = Counter(
        best_random(group(0.1, 1.0, 0.2, 1.0, 0.3, 0.4, seed=seed)).pairs for seed in range(4000)
    )
    assert drawn.keys() == {((1, row),) for row in (0, 2, 4, 5)}
    assert all(abs(count - 1000) < 150 for count in drawn.values())


def test_first_right_wrong_takes_the_first_of_each() -> None:
    assert first_right_wrong(group(0, 1, 0, 1)) == pair(1, 0)
    assert first_right_wrong(group(1, 1, 0, 0)) == pair(0, 2)
    assert first_right_wrong(group(1, 1)) == Labels(skipped="all_right")
    assert first_right_wrong(group(0, 0)) == Labels(skipped="all_wrong")


def test_a_score_at_the_threshold_is_wrong() -> None:
    assert first_right_wrong(group(0.5, 0.6)) == pair(1, 0)
    assert first_right_wrong(group(0.5, 0.6), threshold=0.4) == Labels(skipped="all_right")


def test_all_pairs_of_a_verifier_are_right_times_wrong() -> None:
    """GroupDPO's |Y_c| × |Y_r| = 2 × 3."""
    labels = all_pairs(group(1, 0, 0, 1, 0))
    assert labels.pairs == ((0, 1), (0, 2), (0, 4), (3, 1), (3, 2), (3, 4))


def test_all_pairs_of_distinct_scores_are_every_pair_once() -> None:
    assert all_pairs(group(0.1, 0.3, 0.2)).pairs == ((1, 0), (1, 2), (2, 0))


def test_one_pair_a_group_is_groupdpo_in_expectation() -> None:
    """Eq. 4 weighs each of a group's 6 pairs by 1/6: 6000 draws of one, 1000 each, standard deviation 29."""
    everything = all_pairs(group(1, 0, 0, 1, 0)).pairs
    drawn = Counter(
        all_pairs(group(1, 0, 0, 1, 0, seed=seed), max_pairs=1).pairs for seed in range(6000)
    )
    assert drawn.keys() == {(pair,) for pair in everything}
    assert all(abs(count - 1000) < 160 for count in drawn.values())


@pytest.mark.parametrize("max_pairs", [1, 4, 6, 100])
def test_max_pairs_bounds_a_group_and_never_repeats_a_pair(max_pairs: int) -> None:
    labels = all_pairs(group(1, 0, 0, 1, 0), max_pairs=max_pairs)
    assert len(labels.pairs) == len(set(labels.pairs)) == min(6, max_pairs)
    assert set(labels.pairs) <= set(all_pairs(group(1, 0, 0, 1, 0)).pairs)


def test_sopo_sets_the_datas_response_against_the_worst_sample_whatever_it_scores() -> None:
    assert sopo(group(0.6, 0.3, 0.4, offline=0)) == pair(0, 1)
    assert sopo(group(0.6, 0.9, 0.8, offline=0)) == pair(0, 2)
    assert sopo(group(0.6, 0.9, 0.1, offline=2)) == pair(2, 0)


def test_sopo_skips_a_row_without_a_response_and_a_sample_of_that_very_response() -> None:
    assert sopo(group(0.6, 0.3)) == Labels(skipped="no_offline")
    assert sopo(group(1.0, 0.2, texts="aa", offline=0)) == Labels(skipped="duplicate")
    assert sopo(group(1.0, 0.2, 0.5, texts="aab", offline=0)) == pair(0, 2)


@pytest.mark.parametrize("name", ONLINE_PAIRS)
def test_a_tie_is_skipped_and_not_paired(name: str) -> None:
    reason = "all_wrong" if name == "first_right_wrong" else "tie"
    for size in (1, 2, 5):
        assert get_credit(name).fn(group(*[0.25] * size)) == Labels(skipped=reason)


@pytest.mark.parametrize("name", ONLINE_PAIRS)
def test_a_response_is_never_paired_with_its_equal(name: str) -> None:
    """A noisy signal may score one text twice: then there is nothing to learn, or another to reject."""
    assert get_credit(name).fn(group(1.0, 0.0, texts="aa")) == Labels(skipped="duplicate")
    labels = get_credit(name).fn(group(1.0, 0.0, 0.1, texts="aab"))
    assert (0, 2) in labels.pairs
    assert (0, 1) not in labels.pairs


@pytest.mark.parametrize("name", PAIRS)
def test_chosen_scores_higher_than_rejected_in_random_groups(name: str) -> None:
    """Except by SoPo's decree. Few values, so that ties abound."""
    rng, paired = random.Random(0), 0
    for seed in range(300):
        rewards = [rng.choice([0.0, 0.25, 0.75, 1.0]) for _ in range(rng.randint(1, 6))]
        scores = group(*rewards, offline=0, seed=seed)
        labels = get_credit(name).fn(scores)
        assert bool(labels.pairs) != (labels.skipped is not None)
        assert labels.advantages is None
        for chosen, rejected in labels.pairs:
            assert name == "sopo" or rewards[chosen] > rewards[rejected]
            paired += 1
    assert paired > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_labels(name: str) -> None:
    """What a resume relies on."""
    rewards = (1.0, 0.0, 0.2, 0.4, 0.6, 0.8)
    values = {"max_pairs": 3} if name == "all_pairs" else {}
    first, again = (
        get_credit(name).fn(group(*rewards, offline=0, seed=7), **values) for _ in range(2)
    )
    assert first == again


# --- advantages ----------------------------------------------------------------------------------


def test_group_mean_is_the_distance_from_the_mean() -> None:
    assert group_mean(group(1, 0, 0, 1)).advantages == (0.5, -0.5, -0.5, 0.5)
    assert group_mean(group(3, 0, 0)).advantages == (2.0, -1.0, -1.0)


def test_group_mean_std_divides_by_the_sample_deviation() -> None:
    """3, 0, 0: deviations 2, -1, -1; variance 6 / (3 - 1) = 3."""
    root = math.sqrt(3)
    expected = (2 / root, -1 / root, -1 / root)
    assert group_mean_std(group(3, 0, 0), epsilon=0.0).advantages == pytest.approx(expected)
    expected = (2 / (root + 1), -1 / (root + 1), -1 / (root + 1))
    assert group_mean_std(group(3, 0, 0), epsilon=1.0).advantages == pytest.approx(expected)


def test_leave_one_out_is_the_distance_from_the_others_mean() -> None:
    """3 - 0, 0 - 3/2, 0 - 3/2: 3/2 of the distances from the mean."""
    assert leave_one_out(group(3, 0, 0)).advantages == pytest.approx((3.0, -1.5, -1.5))
    assert leave_one_out(group(1, 0)).advantages == pytest.approx((1.0, -1.0))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_group_of_equal_scores_is_skipped_or_given_zeros(name: str, size: int) -> None:
    """0.1 three times over does not have a mean of exactly 0.1: zero is zero all the same."""
    scores = group(*[0.1] * size)
    assert get_credit(name).fn(scores) == Labels(skipped="tie")
    assert get_credit(name).fn(scores, keep_degenerate=True) == Labels(advantages=(0.0,) * size)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_sum_to_zero_keep_the_order_and_do_not_see_a_shift(name: str) -> None:
    rng = random.Random(0)
    for _ in range(100):
        rewards = [rng.gauss(0, 3) for _ in range(rng.randint(2, 8))]
        advantages = get_credit(name).fn(group(*rewards)).advantages
        shifted = get_credit(name).fn(group(*(reward + 100 for reward in rewards))).advantages
        assert sum(advantages) == pytest.approx(0, abs=1e-9)
        assert shifted == pytest.approx(advantages)
        rows = range(len(rewards))
        assert sorted(rows, key=advantages.__getitem__) == sorted(rows, key=rewards.__getitem__)


def test_only_the_divided_rule_ignores_the_scale_of_rewards() -> None:
    small, large = group(1, 0, 0.5, 0.2), group(10, 0, 5, 2)
    for rule, factor in ((group_mean, 10), (leave_one_out, 10)):
        assert rule(large).advantages == pytest.approx([factor * a for a in rule(small).advantages])
    divided = [group_mean_std(scores, epsilon=0.0).advantages for scores in (small, large)]
    assert divided[0] == pytest.approx(divided[1])


def test_none_labels_nothing_and_skips_nothing() -> None:
    assert none(group(1.0, 1.0)) == Labels()


# --- the table -----------------------------------------------------------------------------------

OUT_OF_BOUNDS = {
    "min_margin": [-0.1, float("nan"), "0.1"],
    "margin": [-0.1, float("inf")],
    "max_pairs": [0, -1, 1.5],
    "threshold": [float("nan"), "0.5"],
    "epsilon": [-1e-6, float("inf")],
    "reject_longest": [1, "yes"],
    "keep_degenerate": [0, "no"],
}


@pytest.mark.parametrize("name", NAMES)
def test_keys_out_of_bounds_are_refused_and_documented(name: str) -> None:
    spec = get_credit(name)
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    schema = create_model(name, __config__=config, **spec.fields)
    schema()
    for key in spec.fields:
        assert f"{key}: " in (spec.fn.__doc__ or "")
        for value in OUT_OF_BOUNDS[key]:
            with pytest.raises(ValidationError, match=key):
                schema(**{key: value})
