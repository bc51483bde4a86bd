"""Paired statistics against exact counts, hand-derived values and simulation; sign flips against scipy's."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from eval.comparison.paired import (
    bootstrap_interval,
    holm,
    mcnemar_p,
    paired_difference,
    sign_flip_p,
)


def exact_p(differences: np.ndarray) -> float:
    """scipy's sign-flip test of the mean, every pattern enumerated."""
    found = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**20,  # more than there are patterns: all of them, once each
    )
    return float(found.pvalue)


@pytest.mark.parametrize(
    ("higher", "lower"), [(0, 0), (3, 0), (1, 1), (9, 4), (80, 54), (499, 43), (1300, 1200)]
)
def test_mcnemar_counts_the_outcomes_of_fair_coins_that_are_as_uneven(
    higher: int, lower: int
) -> None:
    """In whole numbers, and so exactly."""
    n = higher + lower
    ways = sum(math.comb(n, k) for k in range(min(higher, lower) + 1))
    expected = min(Fraction(1), Fraction(2 * ways, 2**n))
    assert mcnemar_p(higher, lower) == pytest.approx(float(expected), rel=1e-12)


def test_three_wins_of_three_by_hand() -> None:
    # Two of the eight outcomes of three coins are as extreme: 2/8.
    found = paired_difference([0, 0, 0, 1], [1, 1, 1, 1])
    assert (found.test, found.p_value, found.mean) == ("mcnemar", 0.25, 0.75)
    assert (found.num_higher, found.num_lower, found.num_equal) == (3, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_few_differences_are_tested_as_scipy_enumerates_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.normal(0.4, 1, size=10).round(1)  # rounded: ties in size, and sums that are equal
    assert sign_flip_p(d) == pytest.approx(exact_p(d[d != 0]), rel=1e-9)


def test_a_hundred_equal_examples_change_no_p_value() -> None:
    d = np.array([0.3, 0.1, -0.2, 0.4, 0.25])
    assert sign_flip_p(np.concatenate([np.zeros(100), d])) == sign_flip_p(d) == exact_p(d)


def test_random_signs_agree_with_all_signs_within_their_own_error() -> None:
    d = np.random.default_rng(5).normal(0.35, 1, size=16)
    expected = exact_p(d)
    assert 0.01 < expected < 0.5
    error = np.sqrt(expected * (1 - expected) / 10_000)
    assert sign_flip_p(d) == pytest.approx(expected, abs=4 * error)


def test_random_signs_never_give_zero() -> None:
    assert sign_flip_p(np.ones(200), flips=999) == pytest.approx(1 / 1000)


def test_sign_flips_of_right_and_wrong_are_mcnemar() -> None:
    d = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 40)
    assert sign_flip_p(d) == pytest.approx(stats.binomtest(9, 12, 0.5).pvalue)


def test_fractions_are_tested_by_sign_flips_and_say_so() -> None:
    few = paired_difference([0.5, 0.25], [1.0, 0.5])
    many = paired_difference(np.zeros(50).tolist(), np.linspace(0.1, 0.6, 50).tolist())
    assert (few.test, many.test) == ("sign_flip_exact", "sign_flip")


def test_interval_of_zeros_and_ones_is_that_of_the_binomial() -> None:
    # The mean of a resample of n values, k of them 1, is Binomial(n, k/n) / n, exactly.
    n, k = 400, 120
    values = np.array([1.0] * k + [0.0] * (n - k))
    expected = stats.binom.ppf([0.025, 0.975], n, k / n) / n
    assert bootstrap_interval(values) == pytest.approx(tuple(expected), abs=1.01 / n)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval(rng.normal(0.2, 1, size=80), seed=seed, resamples=600)
        covered += low <= 0.2 <= high
    # 95 % less the percentile interval's shortfall at n = 80 (about 1 %); ± 3 standard errors of 400 trials.
    assert 0.90 <= covered / 400 <= 0.98


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(4)
    p_values = [sign_flip_p(rng.normal(size=40), seed=s, flips=400) for s in range(300)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_the_seed_decides_and_repeats() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 60)).tolist()
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert paired_difference(a, b, seed=1).interval != paired_difference(a, b, seed=2).interval


def test_order_of_the_models_only_turns_the_sign() -> None:
    a, b = np.random.default_rng(6).normal(size=(2, 12))
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert (forward.mean, forward.p_value) == (-back.mean, back.p_value)
    assert (forward.num_higher, forward.num_lower) == (back.num_lower, back.num_higher)


def test_standard_error_is_that_of_the_mean_difference() -> None:
    a, b = np.random.default_rng(7).normal(size=(2, 30))
    assert paired_difference(a, b).stderr == pytest.approx(stats.sem(b - a))


def test_ten_thousand_examples_stay_in_bounded_memory() -> None:
    a, b = np.random.default_rng(8).normal(size=(2, 10_000))
    tracemalloc.start()
    paired_difference(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_one_example_has_a_difference_and_no_interval() -> None:
    found = paired_difference([0.25], [0.75])
    assert (found.mean, found.interval, found.stderr, found.p_value) == (0.5, None, None, 1.0)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired_is_an_error(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs need one each"):
        paired_difference(a, b)


def test_scaling_leaves_tests_and_counts_alone() -> None:
    found = paired_difference([0.1, 0.2, 0.3], [0.4, 0.1, 0.9])
    percent = found.scaled(100)
    assert percent.mean == pytest.approx(100 * found.mean)
    assert percent.interval == pytest.approx(tuple(100 * each for each in found.interval or ()))
    assert (percent.p_value, percent.num_higher) == (found.p_value, found.num_higher)


def test_holm_by_hand() -> None:
    # Sorted .01, .03, .04: times 3, 2, 1 gives .03, .06, .04; made rising: .03, .06, .06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_findings_rare() -> None:
    rng = np.random.default_rng(9)
    false = sum(min(holm(rng.uniform(size=12).tolist())) < 0.05 for _ in range(2000))
    assert false / 2000 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
