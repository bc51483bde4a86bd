"""bench/claims_alol.py without its runs: its data, which rate an arm gets, when it says the claim holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench import _alol_data
from bench._sorting_rewards import bad_answer, edit_distance, pair_rows, reward, train_rows
from bench.claims_alol import ARMS, FULL, RECIPE, Quality, Result, best_rate, lost, verdict
from prefopt.recipe.load import load_recipe
from recipes.quickstart.task import Problem, score_group

ROOT = Path(__file__).resolve().parents[2]


def result(arm: str, share: int, value: float, *, rate: float = 1e-3, seed: int = 1) -> Result:
    return Result(arm, share, rate, seed, Quality(value, 0, 0, (0, 0, 0), 8), 0.0)


def test_distances_are_the_least_number_of_edits() -> None:
    """kitten, sitting: 3 is the textbook's; the rest by hand."""
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "123") == edit_distance("123", "") == 3
    assert edit_distance("0123", "123") == 1 and edit_distance("12", "21") == 2


def test_the_reward_is_one_for_right_answers_alone_and_graded_for_others() -> None:
    """83051703: 00133578. The careless 013578 lacks two digits: 1 - 2/8."""
    assert reward("83051703:", "00133578") == 1
    assert reward("83051703:", "013578") == 0.75
    assert reward("83051703:", "") == 0 == reward("83051703:", "9" * 20)
    draw = random.Random(0)
    for _ in range(200):
        problem = Problem("".join(draw.choice("0123") for _ in range(8)))
        text = "".join(draw.choice("0123") for _ in range(draw.randint(0, 9)))
        assert (reward(problem.prompt, text) == 1) == (text == problem.answer)


def test_a_bad_answer_is_always_wrong() -> None:
    for digits in ("83051703", "01234567", "76543210", "00000000"):
        problem = Problem(digits)
        assert score_group(problem.prompt, [bad_answer(problem)]) == [0.0]


def test_shares_of_bad_responses_are_nested_and_as_large_as_they_say() -> None:
    draw = random.Random(1)
    problems = [Problem(f"{draw.randrange(10**8):08d}") for _ in range(500)]
    bad = {}
    for share in (0.0, 0.25, 0.5):
        rows = train_rows(problems, bad_frac=share, num_responses=2, seed=3)
        flat = [each["reward"] < 1 for row in rows for each in row["responses"]]
        bad[share] = {number for number, is_bad in enumerate(flat) if is_bad}
        assert len(bad[share]) == pytest.approx(1000 * share, abs=60)
        pairs = pair_rows(rows)
        assert len(pairs) == sum(flat[i] != flat[i + 1] for i in range(0, 1000, 2))
        assert all(pair["chosen"] == Problem(pair["prompt"][:-1]).answer for pair in pairs)
    assert bad[0.0] == set() and bad[0.25] < bad[0.5]


def test_an_arm_gets_the_rate_of_its_best_reward() -> None:
    grid = [result("dpo", 25, value, rate=rate) for rate, value in ((1e-4, 0.8), (1e-3, 0.7))]
    assert best_rate([*grid, result("wbc", 25, 0.9, rate=1e-3)], "dpo") == 1e-4


def test_the_claim_holds_only_if_every_advantage_method_beats_every_other() -> None:
    """The plain filter is reported, and is not among the others."""
    values = {arm.name: 0.9 if arm.name.startswith("a_lol") else 0.8 for arm in ARMS}
    final = [result(name, 50, value) for name, value in {**values, "filtered": 0.95}.items()]
    assert "the claim holds; a plain filter, reward >= mean: 0.950" in verdict(final, 50)
    final = [result(name, 50, value) for name, value in {**values, "a_lol_kl": 0.7}.items()]
    assert "the claim does not hold" in verdict(final, 50)


def test_a_gap_within_two_standard_errors_decides_nothing() -> None:
    """Seeds 0.1 apart around each mean, two of them: an error of 0.05 a mean, 0.0707 of a difference."""
    values = {arm.name: 0.9 if arm.name.startswith("a_lol") else 0.8 for arm in ARMS}
    final = [
        result(name, 50, value + off, seed=seed)
        for name, value in values.items()
        for seed, off in ((1, -0.05), (2, 0.05))
    ]
    assert "gap 0.100 ± 0.071: the seeds do not decide" in verdict(final, 50)


def test_what_is_lost_is_clean_less_dirty_and_nothing_without_clean() -> None:
    final = [result("nll", 0, 0.9), result("nll", 50, 0.5), result("nll", 50, 0.7, seed=2)]
    assert lost([*final, result("dpo", 50, 0.4)], "nll", (0, 50)) == pytest.approx(0.3)
    assert lost([*final, result("dpo", 50, 0.4)], "dpo", (0, 50)) is None


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe_of_as_many_responses(
    arm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arm in ARMS
    monkeypatch.setattr("bench.claims_alol.mean_reward", lambda share: 0.9)
    found = next(each for each in ARMS if each == arm)
    recipe = load_recipe(ROOT / RECIPE, found.overrides(50))
    pairs = 2 if found.reads_pairs else 1
    assert recipe.train.global_batch_size * pairs == 16
    assert recipe.objective is not None
    assert recipe.model.path == str(_alol_data.RUN_DIR / "base")
    assert FULL.steps == recipe.train.max_steps
