"""What a step samples is fixed before anything is sampled, and never older than the bound."""

from __future__ import annotations

from collections import Counter

import pytest

from prefopt.rollouts.plan import PromptPlan, Schedule
from tests.rollouts.rollout_runs import random_prompts


@pytest.mark.parametrize("sync_every", [1, 2, 5, 10])
@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_versions_are_pushed_ones_that_exist_in_time_and_within_the_bound(
    sync_every: int, max_lag: int
) -> None:
    schedule = Schedule(sync_every, max_lag)
    for step in range(60):
        version = schedule.version_of(step)
        assert schedule.pushes_at(version)
        # Sampling runs while step - max_lag is trained: the version must have been pushed by then.
        assert version <= max(0, step - max_lag)
        assert step - version <= max_lag + sync_every - 1 == schedule.most_lag


def test_the_bound_is_reached() -> None:
    schedule = Schedule(sync_every=5, max_lag=2)
    assert max(step - schedule.version_of(step) for step in range(60)) == 6


def test_never_pushing_samples_everything_from_the_start() -> None:
    schedule = Schedule(None, 0)
    assert {schedule.version_of(step) for step in range(50)} == {0}
    assert [step for step in range(50) if schedule.pushes_at(step)] == [0]
    assert schedule.most_lag is None


def test_one_step_off_policy_is_async_rlhf() -> None:
    """Its learner trains step t on what θ_{t-1} sampled (arXiv:2410.18252)."""
    schedule = Schedule(sync_every=1, max_lag=1)
    assert [schedule.version_of(step) for step in range(5)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("per_step", [4, 5, 7])
def test_every_prompt_is_met_once_an_epoch_across_batch_borders(per_step: int) -> None:
    prompts = random_prompts(20)
    plan = PromptPlan(prompts.prompts, seed=1, per_step=per_step, num_samples=2)
    rows = [start.row for step in range(20) for start in plan.starts(step)]
    for epoch in range(len(rows) // 20):
        assert Counter(rows[epoch * 20 : (epoch + 1) * 20]) == Counter(range(20))
    assert rows[:20] != rows[20:40]


def test_plans_repeat_and_seeds_never_do() -> None:
    prompts = random_prompts(12)
    plan, again = (PromptPlan(prompts.prompts, 3, per_step=4, num_samples=3) for _ in range(2))
    assert [plan.starts(step) for step in range(9)] == [again.starts(step) for step in range(9)]
    other = PromptPlan(prompts.prompts, 4, per_step=4, num_samples=3)
    assert plan.starts(0) != other.starts(0)
    starts = [s for step in range(9) for s in plan.starts(step)] + plan.replacements(0, [1, 2], 1)
    seeds = [seed for start in starts for seed in start.seeds]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_replacements_are_other_prompts_placed_after_the_step() -> None:
    plan = PromptPlan(random_prompts(12).prompts, 3, per_step=4, num_samples=1)
    own = {start.row for start in plan.starts(2)}
    for attempt in (1, 2):
        found = plan.replacements(2, [0, 3], attempt)
        assert [start.place for start in found] == [4 * attempt, 4 * attempt + 3]
        assert not own & {start.row for start in found}


def test_resets_roll_in_a_proper_prefix_of_the_offline_response() -> None:
    """DR-PO: uniform over 1 to len - 1 tokens, a share of the prompts (arXiv:2404.08495)."""
    prompts = random_prompts(50).prompts
    always, never, half = (
        PromptPlan(prompts, 0, per_step=50, num_samples=1, reset_frac=frac)
        for frac in (1.0, 0.0, 0.5)
    )
    lengths = Counter()
    for step in range(40):
        for start in always.starts(step):
            offline = prompts[start.row].offline_ids
            assert offline is not None
            assert start.prefix == offline[: len(start.prefix)]
            assert 1 <= len(start.prefix) < len(offline)
            lengths[len(start.prefix), len(offline)] += 1
    longest = max(n for _, n in lengths)
    counts = [lengths[k, longest] for k in range(1, longest)]
    assert min(counts) > 0.6 * max(counts)  # 2,000 draws over at most 6 x 6 cells
    assert not any(start.prefix for start in never.starts(0))
    share = sum(bool(s.prefix) for step in range(40) for s in half.starts(step)) / 2000
    assert abs(share - 0.5) < 5 * (0.25 / 2000) ** 0.5
