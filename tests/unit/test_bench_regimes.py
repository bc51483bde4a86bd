"""bench/regimes.py without its runs: which learning rates it takes, what its recipe says, what it draws."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench._svg import Chart, Line, Point, write_svg
from bench.regimes import FULL, RECIPE, Result, best_rate, last_line, shared_rate
from prefopt.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def result(arm: str, rate: float, sampled: float, seed: int = 1) -> Result:
    return Result(arm, rate, seed, greedy=0.0, sampled=sampled, curve=(), drift=0.0, seconds=0.0)


GRID = [
    result("offline", 1e-5, 0.30), result("offline", 1e-4, 0.26), result("offline", 1e-3, 0.10),
    result("online", 1e-5, 0.35), result("online", 1e-4, 0.50), result("online", 1e-3, 0.60),
]  # fmt: skip


def test_every_arm_gets_its_own_best_rate() -> None:
    assert (best_rate(GRID, "offline"), best_rate(GRID, "online")) == (1e-5, 1e-3)


@pytest.mark.parametrize(("base", "rate"), [(0.25, 1e-4), (0.28, 1e-5), (0.90, 1e-5)])
def test_the_shared_rate_is_the_largest_that_hurts_no_arm(base: float, rate: float) -> None:
    """At 1e-3 offline falls below the base; where every rate hurts some arm, the smallest is taken."""
    assert shared_rate(GRID, base) == rate


def test_the_last_line_averages_over_seeds() -> None:
    final = [
        result(arm.name, 1e-4, sampled, seed)
        for arm, mean in zip(FULL.arms(), (0.2, 0.3, 0.4, 0.5, 0.6), strict=True)
        for seed, sampled in ((1, mean - 0.1), (2, mean + 0.1))
    ]
    assert last_line(FULL.arms(), {"sampled": 0.25}, final) == (
        "offline=0.200 semi_online=0.400 online=0.500 grpo=0.600 base=0.250"
    )


def test_arms_differ_in_the_interval_or_the_objective_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    recipes = {arm.name: load_recipe(RECIPE, arm.overrides) for arm in FULL.arms()}
    intervals = {
        name: recipe.rollouts and recipe.rollouts.sync_every for name, recipe in recipes.items()
    }
    assert intervals == {"offline": None, "s=100": 100, "s=10": 10, "online": 1, "grpo": 1}
    for recipe in recipes.values():
        assert recipe.rollouts is not None
        regime = recipe.rollouts.model_copy(update={"sync_every": 1})
        assert regime == recipes["online"].regime
        assert recipe.train == recipes["online"].train


def test_the_plot_is_an_svg_with_every_series(tmp_path: Path) -> None:
    points = [Point(0, 0.0), Point(10, 1.0)]
    lines = [Line("a < b", points), Line("dots", points, joined=False)]
    write_svg(tmp_path / "plot.svg", [Chart("t", lines, [(0, "0"), (10, "10")], ("base", 0.5))])
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("polyline") == 1 and tags.count("circle") == 4
    assert "a < b" in [element.text for element in root.iter()]
    first, last = [e for e in root.iter() if e.tag.endswith("circle")][:2]
    assert float(first.get("cy", "nan")) > float(last.get("cy", "nan"))  # y grows downwards
