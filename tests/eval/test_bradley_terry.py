"""Bradley-Terry fits, style features and clustered errors against closed forms, scikit-learn, planted effects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.bradley_terry import (
    bootstrap_weights,
    fit_newton,
    player_columns,
    win_rate,
    win_rate_interval,
)
from eval.statistics import clustered_mean
from eval.style import (
    STYLE_V01,
    STYLE_V2,
    StyledBattle,
    density_differences,
    markdown_counts,
    pool,
    published_counts,
    ratio_differences,
    style_controlled,
)


def sklearn_fit(features: np.ndarray, points: np.ndarray, weights: np.ndarray, c: float):
    """The published recipe: every battle twice, so that a tie is one win and one loss."""
    from sklearn.linear_model import LogisticRegression

    twice = np.concatenate([features, features])
    wins = np.concatenate([np.ceil(points), np.floor(points)])
    model = LogisticRegression(fit_intercept=False, C=c, tol=1e-10, max_iter=10_000)
    return model.fit(twice, wins, np.concatenate([weights, weights])).coef_[0]


def test_two_players_have_the_rating_difference_that_predicts_the_win_rate() -> None:
    """6 wins, 1 loss, 1 tie: 6.5 of 8, so e^d = 6.5/1.5, d = ln(13/3) = 1.466337, Elo 400 d / ln 10 = 254.73."""
    columns = player_columns(np.zeros(3, int), np.ones(3, int), 2)
    one, two = fit_newton(columns, np.array([1.0, 0.0, 0.5]), np.array([6.0, 1.0, 1.0]))
    assert one - two == pytest.approx(1.466337, abs=1e-6)
    elo = 400 * (one - two) / math.log(10)
    assert elo == pytest.approx(254.73, abs=0.01)
    assert 1 / (1 + 10 ** (-elo / 400)) == pytest.approx(win_rate(6, 1, 1)) == pytest.approx(0.8125)


def test_ratings_of_many_players_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, 400)
    second = (first + rng.integers(1, 5, 400)) % 5
    points = rng.choice([0.0, 0.5, 1.0], 400, p=[0.4, 0.2, 0.4])
    weights = rng.integers(1, 4, 400).astype(float)
    columns = math.log(10) * player_columns(first, second, 5)
    ours = fit_newton(columns, points, weights)
    theirs = sklearn_fit(columns, points, weights, c=np.inf)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert abs(ours.mean()) < 1e-12  # no battle determines a shift of all ratings
    ridge = fit_newton(columns, points, 2 * weights, l2=1000.0)
    np.testing.assert_allclose(ridge, sklearn_fit(columns, points, weights, c=0.001), atol=1e-5)
    assert np.abs(ridge - ours).max() > 0.01  # the penalty does something


def test_intervals_are_those_of_listed_battles_drawn_with_replacement() -> None:
    wins, losses, ties = 70, 100, 30
    points = np.repeat([1.0, 0.0, 0.5], [wins, losses, ties])
    rng = np.random.default_rng(1)
    drawn = points[rng.integers(0, len(points), (20_000, len(points)))].mean(1)
    found = win_rate_interval(wins, losses, ties, percentiles=(2.5, 97.5), resamples=100_000)
    np.testing.assert_allclose(found, np.percentile(drawn, [2.5, 97.5]), atol=0.004)


def test_bootstrap_draws_as_many_battles_as_there_are() -> None:
    weights = np.array([3.0, 1.0, 6.0])
    drawn = bootstrap_weights(weights, 2000)
    assert (drawn.sum(1) == 10).all()
    np.testing.assert_allclose(drawn.mean(0), weights, atol=0.15)
    np.testing.assert_array_equal(drawn, bootstrap_weights(weights, 2000))


def test_markdown_outside_code_is_counted() -> None:
    text = (
        "# Title\n### Sub\n#no header\n- one\n  * two\n3. three\n**bold** and __also__ **__both__**\n"
        "```python\n# comment\n- minus\n**kwargs** = 1\n```\n"
    )
    assert markdown_counts(text) == (2, 3, 4)


def test_published_counts_are_numbers_or_numbers_by_kind() -> None:
    metadata = {"header_count": {"h1": 1, "h2": 2}, "list_count": {"ordered": 4}, "bold_count": 5}
    assert published_counts(metadata) == (3, 4, 5)
    assert published_counts({"header_count": 1}) is None


def test_style_differences_are_the_published_formulas() -> None:
    """v0.1: (300-100)/401, (4-0)/5. v2: (300-100)/400; ρ = 4/301 and 0/101, so 4/301 / (4/301 + 1)."""
    model, baseline = np.array([[300.0, 4, 0, 0]]), np.array([[100.0, 0, 0, 0]])
    np.testing.assert_allclose(ratio_differences(model, baseline), [[200 / 401, 0.8, 0, 0]])
    np.testing.assert_allclose(
        density_differences(model, baseline), [[0.5, (4 / 301) / (4 / 301 + 1), 0, 0]]
    )
    np.testing.assert_array_equal(density_differences(0 * model, 0 * baseline), [[0, 0, 0, 0]])


def planted(num_models: int, per_model: int, effect: float) -> list[list[StyledBattle]]:
    """Models equal to the baseline whose answers are ever longer; a judge who likes length by ``effect``."""
    rng = np.random.default_rng(2)
    groups = []
    for number in range(num_models):
        lengths = rng.integers(50, 200, per_model)
        ours = (lengths * rng.uniform(0.5, 3.0 + number, per_model)).astype(int)
        difference = (ours - lengths) / (ours + lengths + 1)
        won = rng.random(per_model) < 1 / (1 + np.exp(-effect * difference))
        groups.append(
            [
                StyledBattle(float(win), 1, (int(our), 0, 0, 0), (int(their), 0, 0, 0))
                for win, our, their in zip(won, ours, lengths, strict=True)
            ]
        )
    return groups


@pytest.mark.parametrize(("num_models", "tolerance"), [(1, 0.04), (3, 0.025)])
def test_style_control_recovers_a_planted_length_effect(num_models: int, tolerance: float) -> None:
    groups = planted(num_models, 3000, effect=4.0)
    raw = np.mean([battle.points for battle in groups[-1]])
    battles = pool(groups[::-1])
    found = style_controlled(battles, STYLE_V01, 20)
    deviation = ratio_differences(battles.model_style, battles.baseline_style)[:, 0].std()
    assert raw > 0.65  # the judge's liking alone makes equal models look better
    assert found.equal_style == pytest.approx(0.5, abs=tolerance)
    assert found.coefficients["length"] == pytest.approx(4.0 * deviation, rel=0.1)
    assert found.coefficients["bold"] == 0  # the same everywhere: no effect, and no 0/0


def test_the_published_score_needs_other_models_to_control_with() -> None:
    """Alone, a model is measured at its own average style; among shorter-winded ones at theirs, too."""
    longest = planted(3, 2000, effect=4.0)[::-1]
    raw = np.mean([battle.points for battle in longest[0]])
    alone = style_controlled(pool(longest[:1]), STYLE_V01, 5).score
    among = style_controlled(pool(longest), STYLE_V01, 5).score
    assert alone > raw
    assert among < alone - 0.03


@pytest.mark.parametrize("method", [STYLE_V01, STYLE_V2], ids=["v0.1", "v2"])
def test_style_controlled_scores_agree_with_scikit_learn(method) -> None:
    """v2's fit stops short of the maximum by design, hence its tolerance."""
    rng = np.random.default_rng(3)
    rows = [
        (model, rng.choice([0.0, 0.5, 1.0]), rng.integers(1, 4), *rng.integers(1, 90, (2, 4)))
        for model in range(2)
        for _ in range(250)
    ]
    groups = [
        [StyledBattle(p, int(w), tuple(o), tuple(t)) for m, p, w, o, t in rows if m == model]
        for model in range(2)
    ]
    battles = pool(groups)
    listed = np.repeat(np.arange(len(rows)), battles.weights.astype(int))  # one line a battle
    style = method.differences(battles.model_style, battles.baseline_style)[listed]
    style = (style - style.mean(0)) / style.std(0, ddof=method.ddof)
    players = np.zeros((len(listed), 3))
    players[np.arange(len(listed)), battles.model[listed]] = method.scale
    players[:, 2] = -method.scale
    c = sklearn_fit(
        np.concatenate([players, style], 1),
        battles.points[listed],
        np.ones(len(listed)),
        c=1.0 if method is STYLE_V01 else np.inf,
    )
    expected = 1 / (1 + math.exp(-method.scale * (c[0] - c[2])))
    found = style_controlled(battles, method, 50)
    assert found.score == pytest.approx(expected, abs=1e-5 if method is STYLE_V01 else 0.01)
    np.testing.assert_allclose(
        list(found.coefficients.values()), c[3:], atol=1e-4 if method is STYLE_V01 else 0.02
    )
    assert found.interval[0] < found.score < found.interval[1]


def test_clustered_errors_are_those_of_the_mean_where_clusters_hold_one() -> None:
    values = [3.0, 5.0, 8.0, 9.0]
    found = clustered_mean([(value, 1.0) for value in values])
    assert found.value == 6.25
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 2)


def test_repeating_every_observation_in_its_cluster_adds_no_certainty() -> None:
    values = [3.0, 5.0, 8.0, 9.0]
    once = clustered_mean([(value, 1.0) for value in values])
    assert clustered_mean([(5 * value, 5.0) for value in values]).stderr == pytest.approx(
        once.stderr
    )


def test_a_clustered_error_derived_by_hand() -> None:
    """Clusters {1, 3}, {5}: m = 3, residuals 4 - 6 = -2 and 5 - 3 = 2; sqrt(2/1 · 8)/3 = 4/3."""
    found = clustered_mean([(4.0, 2.0), (5.0, 1.0), (0.0, 0.0)])
    assert (found.value, found.stderr) == (3.0, pytest.approx(4 / 3))
    assert clustered_mean([(4.0, 2.0)]).stderr is None
