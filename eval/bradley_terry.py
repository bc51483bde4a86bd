"""Bradley-Terry models of battles: the two-player case in closed form, and two fits of the general one.

Battles are counted, never listed: a row of a design matrix has the number of battles that are alike, so that a
bootstrap over battles is a multinomial draw of these numbers. numpy, fp64; torch only in `fit_lbfgs`.
"""

from __future__ import annotations

import numpy as np

from prefopt.errors import DataError

_SEED = 42
_TOLERANCE = 1e-10
_MAX_STEPS = 100
_RANK_TOLERANCE = 1e-13
"""Of a curvature's singular values, to the largest. A free direction's is a few 1e-16 and not 0; numpy's own bound
(n times 2e-16) takes some of them for curved, and all ratings are shifted by rounding errors blown up."""


def win_rate(wins: float, losses: float, ties: float) -> float:
    """The Bradley-Terry win rate of the first of two players, in [0, 1]: a tie is half a win, half a loss.

    With two players the likelihood depends on R_1 - R_2 alone and is greatest where the predicted win rate is
    the observed one, so 1/(1 + 10^((R_2 - R_1)/400)) is the fraction of wins.
    Raises: DataError for no battles.
    """
    battles = wins + losses + ties
    if not battles:
        raise DataError("there is no battle with a verdict: no win rate")
    return (wins + ties / 2) / battles


def win_rate_interval(
    wins: int, losses: int, ties: int, *, percentiles: tuple[float, float], resamples: int
) -> tuple[float, float]:
    """Bootstrap percentiles of `win_rate` over battles, in [0, 1]; depends on nothing but the three numbers.

    Percentiles of ratings and of win rates are the same ones: one is a monotone function of the other.
    """
    counts = np.array([wins, losses, ties])
    drawn = np.random.default_rng(_SEED).multinomial(
        counts.sum(), counts / counts.sum(), size=resamples
    )
    rates = (drawn[:, 0] + drawn[:, 2] / 2) / counts.sum()
    low, high = np.percentile(rates, percentiles)
    return float(low), float(high)


def player_columns(first: np.ndarray, second: np.ndarray, num_players: int) -> np.ndarray:
    """(n, num_players): +1 for the first player of a battle, -1 for the second.

    Args:
        first: (n,) indices of players. second: likewise.
    """
    columns = np.zeros((len(first), num_players))
    rows = np.arange(len(first))
    columns[rows, first] = 1.0
    columns[rows, second] = -1.0
    return columns


def bootstrap_weights(weights: np.ndarray, resamples: int) -> np.ndarray:
    """(resamples, n): how often each row's battles are drawn, of Σ weights draws with replacement."""
    total = int(weights.sum())
    return np.random.default_rng(_SEED).multinomial(total, weights / total, size=resamples)


def fit_newton(
    features: np.ndarray, points: np.ndarray, weights: np.ndarray, *, l2: float = 0.0
) -> np.ndarray:
    """(d,) coefficients c that minimise Σ_i w_i · BCE(σ(x_i·c), y_i) + l2/2 · |c|², to machine precision.

    Without ``l2``, of all minimisers (ratings are known up to a shift) the one of least norm, which is where
    solvers that start at 0 end; a player who wins every battle then has no finite rating, and gets the one
    beyond which fp64 sees no difference.

    Args:
        features: (n, d). points: (n,) of the first player: 1, 0.5 or 0. weights: (n,) battles.
    """
    coefficients = np.zeros(features.shape[1])
    loss = _loss(features, points, weights, coefficients, l2)
    for _ in range(_MAX_STEPS):
        odds = _sigmoid(features @ coefficients)
        gradient = features.T @ (weights * (odds - points)) + l2 * coefficients
        curvature = (features * (weights * odds * (1 - odds))[:, None]).T @ features
        curvature += l2 * np.eye(len(coefficients))
        step = np.linalg.lstsq(curvature, -gradient, rcond=_RANK_TOLERANCE)[0]
        size = 1.0
        while (new := _loss(features, points, weights, coefficients + size * step, l2)) > loss:
            size /= 2
            if size < _TOLERANCE:  # no lower loss in fp64: this is the minimum
                return coefficients
        coefficients, loss = coefficients + size * step, new
        if np.abs(size * step).max() < _TOLERANCE:
            break
    return coefficients


def fit_lbfgs(features: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(d,) coefficients as Arena-Hard v2 fits them: 50 steps of L-BFGS on the summed BCE, from 0.5.

    With its learning rate of 0.1 it stops short of the maximum: by 0.1 points of win rate for one model, by a
    point for thirty. Published numbers were made so; the exact maximum is `fit_newton`'s.

    Source: methods J2 (learning rate 0.1, 50 iterations, tolerances 1e-9, fp32).
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    x, y, w = (
        torch.tensor(array, dtype=torch.float32) for array in (features, points, weights)
    )  # (n, d), (n,), (n,)
    coefficients = torch.full((x.shape[1],), 0.5, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], lr=0.1, max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-9
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(x @ coefficients, y, weight=w, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return coefficients.detach().double().numpy()


def _loss(
    features: np.ndarray, points: np.ndarray, weights: np.ndarray, at: np.ndarray, l2: float
) -> float:
    logits = features @ at
    # BCE = log(1 + e^z) - y z; logaddexp does not overflow
    return float(weights @ (np.logaddexp(0, logits) - points * logits) + l2 / 2 * at @ at)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
