"""Is the second model better on the same examples? Paired differences: interval, test, correction. fp64.

Interval and McNemar's test are scipy's, imported when they are asked for. The sign-flip test is ours: scipy's
draws other signs, so that published p-values would change, and takes eight times as long. Holm's correction is
ours, too: statsmodels' gives the same numbers, for five more packages and a collection of all garbage a call.

An example is the unit: several samples or turns of it are one value already, so that what depends on each
other is never counted as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000
_MAX_EXACT_SIGNS = 13
"""2^13 sign patterns are fewer than `RESAMPLES` random ones."""
_BLOCK = 1 << 21
"""Numbers drawn at a time: 16 MiB of indices and as much of values, however many examples there are."""


@dataclass(frozen=True)
class Difference:
    """Second minus first, over the examples that both have."""

    n: int
    mean: float
    stderr: float | None
    """Of the mean, ddof 1; None with one example."""
    interval: tuple[float, float] | None
    """Bootstrap percentile interval at `LEVEL`; None with one example."""
    p_value: float
    """Two-sided, of no difference."""
    test: str
    """``mcnemar``: exact binomial test on the examples where 0/1 values differ. ``sign_flip_exact``,
    ``sign_flip``: permutation test of the mean, all sign patterns or random ones."""
    num_higher: int
    num_lower: int
    num_equal: int

    def scaled(self, scale: float) -> Difference:
        """In another unit: 100 for percentage points."""
        return replace(
            self,
            mean=self.mean * scale,
            stderr=None if self.stderr is None else self.stderr * scale,
            interval=self.interval and (self.interval[0] * scale, self.interval[1] * scale),
        )


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Second minus first, example by example.

    Args:
        first, second: a value an example, aligned by the caller, finite.
        seed: of the bootstrap and of the random sign flips.
        resamples: bootstrap resamples, and random sign patterns.

    Raises: ValueError for no examples or unequal lengths.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} values: pairs need one each, at least once")
    d = b - a
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    higher, lower = int((d > 0).sum()), int((d < 0).sum())
    if binary:
        p_value, test = mcnemar_p(higher, lower), "mcnemar"
    else:
        exact = higher + lower <= _MAX_EXACT_SIGNS
        p_value = sign_flip_p(d, seed=seed, flips=resamples)
        test = "sign_flip_exact" if exact else "sign_flip"
    several = len(d) > 1
    return Difference(
        n=len(d),
        mean=float(d.mean()),
        stderr=float(d.std(ddof=1) / math.sqrt(len(d))) if several else None,
        interval=bootstrap_interval(d, seed=seed, resamples=resamples) if several else None,
        p_value=p_value,
        test=test,
        num_higher=higher,
        num_lower=lower,
        num_equal=len(d) - higher - lower,
    )


def bootstrap_interval(
    values: Floats, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean: quantiles of the means of ``resamples`` draws with replacement.

    Too narrow for few examples, as any percentile interval: by about sqrt((n-1)/n), and more under skew.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    from scipy import stats

    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BLOCK // len(values)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def mcnemar_p(num_higher: int, num_lower: int) -> float:
    """Two-sided exact p: were the examples that differ coin flips? 1 where none differs.

        p = min(1, 2 Σ_{k <= min(b, c)} C(b + c, k) / 2^(b + c))

    Source: McNemar 1947, Psychometrika 12(2); the exact form is the binomial test of b against c.
    """
    from scipy import stats

    n = num_higher + num_lower
    return float(stats.binomtest(num_higher, n).pvalue) if n else 1.0


def sign_flip_p(differences: Floats, *, seed: int = 0, flips: int = RESAMPLES) -> float:
    """Two-sided p of the mean difference, were each difference as likely to have the other sign.

    All sign patterns where there are few; else ``flips`` random ones, p = (1 + those as extreme) / (1 + flips),
    which is never 0. Differences of 0 have no sign and change nothing.
    Source: Fisher 1935, The Design of Experiments, section 21; the 1 added: Phipson & Smyth 2010,
    arXiv:1603.05766.
    """
    d = differences[differences != 0]
    observed = abs(d.sum())
    # Equal sums differ in their last bits by the order of adding: such a tie counts as extreme.
    threshold = observed - 1e-12 * np.abs(d).sum()
    if len(d) <= _MAX_EXACT_SIGNS:
        patterns = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
        return float(np.mean(np.abs(_flipped_sums(d, patterns)) >= threshold))
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(d))
    extreme = 0
    for start in range(0, flips, rows):
        size = (min(rows, flips - start), len(d))
        bits = rng.integers(2, size=size, dtype=np.uint8)
        extreme += int((np.abs(_flipped_sums(d, bits)) >= threshold).sum())
    return (1 + extreme) / (1 + flips)


def _flipped_sums(d: Floats, bits: npt.NDArray[np.integer]) -> Floats:
    """``sum of d`` with the signs of those with bit 1 turned: total - 2 * their sum."""
    return d.sum() - 2 * (bits.astype(np.float64) @ d)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: of m, the i-th smallest times m - i + 1, made rising.

    Rejecting those below α keeps the chance of any false one below α, however they depend on each other.
    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted
