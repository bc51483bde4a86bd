"""How an answer looks (length, headers, lists, bold), and win rates with that held fixed.

Arena-Hard's style control: a Bradley-Terry model with a column a feature of style beside those of the models. The
win rate is the one of the models' coefficients alone. Features are standardised over all battles of the fit, so
"alone" means at the *average* style of these: with one model in the fit that is its own style, and hardly anything
is controlled. Published tables fit dozens of models together; `StyledScore.equal_style` is the same fit read where
model and baseline look alike, which means the same with one model or many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bradley_terry import bootstrap_weights, fit_lbfgs, fit_newton, player_columns

FEATURES = ("length", "headers", "lists", "bold")

_CODE = re.compile(r"```([^`]*)```")
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
# Kinds are searched apart, as published: joined by |, one match would hide another (``**__both__**`` is two).
_LIST_ITEMS = (re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE))
_BOLD = (re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__"))


def markdown_counts(text: str) -> tuple[int, int, int]:
    """Headers, list items and bold spans of an answer, code blocks emptied first."""
    for block in _CODE.findall(text):
        # As published: what a block holds goes wherever it stands, its fences stay.
        text = text.replace(block, "")
    lists, bold = (sum(len(kind.findall(text)) for kind in kinds) for kinds in (_LIST_ITEMS, _BOLD))
    return len(_HEADER.findall(text)), lists, bold


def published_counts(metadata: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The same from an answer file's metadata (a number, or numbers by kind); None if it lacks them."""
    found = [metadata.get(f"{name}_count") for name in ("header", "list", "bold")]
    if any(each is None for each in found):
        return None
    headers, lists, bold = (
        sum(each.values()) if isinstance(each, Mapping) else int(each or 0) for each in found
    )
    return headers, lists, bold


@dataclass(frozen=True)
class StyledBattle:
    """Battles over one question that ended alike."""

    points: float
    """Of the model: 1, 0.5 or 0."""
    weight: int
    """How many."""
    model_style: Sequence[float]
    """(4,) numbers of `FEATURES`."""
    baseline_style: Sequence[float]


@dataclass(frozen=True)
class StyledBattles:
    """Battles of models with one baseline, those alike in one row with their number."""

    model: np.ndarray
    """(n,) 0 is the model whose score is wanted."""
    points: np.ndarray
    """(n,) of the model: 1, 0.5 or 0."""
    weights: np.ndarray
    """(n,) battles."""
    model_style: np.ndarray
    """(n, 4) numbers of `FEATURES`."""
    baseline_style: np.ndarray
    """(n, 4)"""

    @property
    def num_models(self) -> int:
        return int(self.model.max()) + 1


@dataclass(frozen=True)
class StyleMethod:
    """One edition's style control."""

    differences: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(n, 4), (n, 4) -> (n, 4): how the model's style differs from the baseline's."""
    ddof: int
    """Of the standard deviation that features are divided by."""
    scale: float
    """Of the models' columns: ln 10 gives ratings in powers of ten."""
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    percentiles: tuple[float, float]
    median: bool
    """The score is the median of the resamples, not that of all battles."""


@dataclass(frozen=True)
class StyledScore:
    """Win rates in [0, 1]."""

    score: float
    """As published: at the average style of all battles in the fit."""
    interval: tuple[float, float]
    equal_style: float
    """Where model and baseline look alike."""
    coefficients: Mapping[str, float]
    """Log-odds a standard deviation of each feature."""


def ratio_differences(model: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Arena-Hard v0.1: (a - b) / (a + b + 1) of each number."""
    return (model - baseline) / (model + baseline + 1)


def density_differences(model: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Arena-Hard v2: (a - b)/(a + b) of lengths; (ρ_a - ρ_b)/(ρ_a + ρ_b + 1) of ρ = count/(length + 1)."""
    total = model[:, :1] + baseline[:, :1]
    # two empty answers do not differ in length; dividing by 1 says so
    length = (model[:, :1] - baseline[:, :1]) / np.where(total == 0, 1, total)
    ours, theirs = (each[:, 1:] / (each[:, :1] + 1) for each in (model, baseline))
    return np.concatenate([length, ratio_differences(ours, theirs)], axis=1)


def _fit_v01(features: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # Every battle is there twice, so that a tie can be a win and a loss; C = 1 weighs them against |c|²/2.
    return fit_newton(features, points, 2.0 * weights, l2=1.0)


STYLE_V01 = StyleMethod(
    ratio_differences, 0, float(np.log(10)), _fit_v01, percentiles=(2.5, 97.5), median=False
)
STYLE_V2 = StyleMethod(density_differences, 1, 1.0, fit_lbfgs, percentiles=(5.0, 95.0), median=True)


def style_controlled(battles: StyledBattles, method: StyleMethod, resamples: int) -> StyledScore:
    """The score of model 0 with style held fixed.

    Source: methods J2. There the style features are baseline minus model in v0.1; the sign changes no score.
    """
    raw = method.differences(battles.model_style, battles.baseline_style)
    mean, deviation = _moments(raw, battles.weights, method.ddof)
    baseline = np.full_like(battles.model, battles.num_models)
    players = player_columns(battles.model, baseline, battles.num_models + 1)
    features = np.concatenate([method.scale * players, (raw - mean) / deviation], axis=1)
    fitted = method.fit(features, battles.points, battles.weights)
    drawn = bootstrap_weights(battles.weights, resamples)
    log_odds = np.array(
        [_log_odds(method.fit(features, battles.points, each), battles, method) for each in drawn]
    )
    low, middle, high = np.percentile(
        _rate(log_odds), [method.percentiles[0], 50, method.percentiles[1]]
    )
    whole = _log_odds(fitted, battles, method)
    style = fitted[battles.num_models + 1 :]
    return StyledScore(
        score=float(middle if method.median else _rate(whole)),
        interval=(float(low), float(high)),
        equal_style=float(_rate(whole - style @ (mean / deviation))),
        coefficients=dict(zip(FEATURES, map(float, style), strict=True)),
    )


def pool(groups: Sequence[Sequence[StyledBattle]]) -> StyledBattles:
    """Battles of several models as `StyledBattles`.

    Args:
        groups: by model, the first the one whose score is wanted.
    """
    rows = [(number, each) for number, group in enumerate(groups) for each in group]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(each, name) for _, each in rows], dtype=np.float64)

    return StyledBattles(
        np.array([number for number, _ in rows]),
        column("points"),
        column("weight"),
        column("model_style"),
        column("baseline_style"),
    )


def _moments(values: np.ndarray, weights: np.ndarray, ddof: int) -> tuple[np.ndarray, np.ndarray]:
    """(4,), (4,): weighted mean and standard deviation, 1 for a feature that is the same everywhere."""
    total = weights.sum()
    mean = weights @ values / total
    variance = weights @ (values - mean) ** 2 / max(total - ddof, 1)
    deviation = np.sqrt(variance)
    return mean, np.where(deviation < 1e-12, 1.0, deviation)


def _log_odds(
    coefficients: np.ndarray, battles: StyledBattles, method: StyleMethod
) -> np.floating[Any]:
    return method.scale * (coefficients[0] - coefficients[battles.num_models])


def _rate(log_odds: Any) -> Any:
    return np.exp(-np.logaddexp(0, -log_odds))
