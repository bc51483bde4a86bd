"""Rollouts feed the trainer what the schedule says, and a step learns from exactly what was sampled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.data.groups import GroupList
from prefopt.errors import SignalError, TrainingError
from prefopt.model.collate import pack
from prefopt.model.logps import LogpModel
from prefopt.recipe.registry import OBJECTIVES, get_objective
from prefopt.rollouts import regime as regime_module
from prefopt.rollouts.experience import ExperienceLog, read_log
from prefopt.rollouts.worker import Worker
from prefopt.training.metrics import read_metrics
from prefopt.training.trainer import PreferenceTrainer
from prefopt.types import Group
from tests.rollouts.rollout_runs import make_rollout_trainer, random_prompts
from tests.unit.memory_trainer import (
    VOCABULARY,
    lora_llama,
    make_trainer,
    random_pairs,
    trained_weights,
)
from tests.unit.objective_cases import REQUIRED
from tests.unit.tiny_models import tiny_model

PROMPTS = random_prompts(10)


def train(trainer: PreferenceTrainer) -> list[dict[str, Any]]:
    """Trains to the end, and returns the rows of metrics.jsonl."""
    try:
        assert trainer.train().finished
    finally:
        trainer.close()
    return read_metrics(trainer.log.path)


def logged_groups(trainer: PreferenceTrainer, step: int) -> list[Group]:
    """What the trainer was given at ``step``, from the experience log."""
    log: ExperienceLog = trainer.regime.log  # type: ignore[attr-defined]
    batch = log.get(step)
    assert batch is not None
    return [g.trainable(batch.version) for g in batch.groups if g.is_trained_on]


def test_online_rollouts_are_on_policy_to_rounding(tmp_path: Path) -> None:
    """HF generate with a cache against our packed forward: the same fp32 maths in another order."""
    rows = train(make_rollout_trainer(tmp_path, PROMPTS))
    assert len(rows) == 5
    for row in rows:
        assert row["rollout/lag"] == 0
        assert row["rollout/policy_gap"] < 1e-5
        assert row["rollout/probe_gap_max"] < 1e-4
    # From the second step on the policy is not its reference any more.
    assert abs(rows[0]["kl/reference"]) < 1e-5 < abs(rows[-1]["kl/reference"])


def test_the_signal_is_learnt(tmp_path: Path) -> None:
    rows = train(make_rollout_trainer(tmp_path, PROMPTS, max_steps=40, global_batch_size=8))
    first, last = (
        sum(row["rollout/reward"] for row in part) / len(part) for part in (rows[:8], rows[-8:])
    )
    assert last > first + 0.15


def test_a_step_is_the_offline_step_on_the_pairs_that_were_logged(tmp_path: Path) -> None:
    """Sampled once and never synced, the run is offline DPO: the un-rolled path must agree."""
    online = make_rollout_trainer(tmp_path / "on", PROMPTS, regime={"sync_every": None})
    rows = train(online)
    assert [row["rollout/lag"] for row in rows] == [0, 1, 2, 3, 4]
    weights = trained_weights(online)
    windows = [logged_groups(online, step) for step in range(5)]
    sizes = {len(groups) for groups in windows}
    pairs = [
        Group(f"{step}-{i}", g.prompt_ids, g.responses, g.pairs)
        for step, groups in enumerate(windows)
        for i, g in enumerate(groups)
    ]
    offline = make_trainer(
        tmp_path / "off", GroupList(pairs), objective={"name": "dpo", "beta": 0.1},
        learning_rate=1e-2, lr_scheduler="constant", warmup_frac=0.0, max_steps=5,
    )  # fmt: skip
    ends = [sum(map(len, windows[: step + 1])) for step in range(5)]
    starts = [0, *ends]
    offline.regime.rows = lambda step: list(range(starts[step], ends[step]))  # type: ignore[method-assign]
    want = train(offline)
    assert sizes == {4}
    torch.testing.assert_close(
        [row["loss/total"] for row in rows], [row["loss/total"] for row in want], rtol=1e-5, atol=0
    )
    for name, weight in trained_weights(offline).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sync_every", "max_lag"), [(1, 1), (1, 2), (2, 1)])
def test_asynchronous_runs_equal_their_schedule_run_in_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_every: int, max_lag: int
) -> None:
    """Who waits for whom changes nothing: the same versions sample the same batches."""
    settings = {"sync_every": sync_every, "max_lag": max_lag}
    threaded = make_rollout_trainer(tmp_path / "threaded", PROMPTS, regime=settings, max_steps=7)
    rows = train(threaded)
    monkeypatch.setattr(regime_module, "Worker", lambda threaded: Worker(threaded=False))
    inline = make_rollout_trainer(tmp_path / "inline", PROMPTS, regime=settings, max_steps=7)
    want = train(inline)
    assert [r["loss/total"] for r in rows] == [r["loss/total"] for r in want]
    schedule = threaded.regime.schedule  # type: ignore[attr-defined]
    assert [r["rollout/lag"] for r in rows] == [
        step - schedule.version_of(step) for step in range(7)
    ]
    for name, weight in trained_weights(inline).items():
        assert torch.equal(trained_weights(threaded)[name], weight)


def test_versions_on_disk_are_kept_as_long_as_needed_and_no_longer(tmp_path: Path) -> None:
    rows = train(make_rollout_trainer(tmp_path, PROMPTS, regime={"sync_every": 2}, max_steps=7))
    assert [row["rollout/lag"] for row in rows] == [0, 1, 0, 1, 0, 1, 0]
    kept = sorted(path.name[:13] for path in (tmp_path / "policies").iterdir())
    assert kept == ["step-00000004", "step-00000006"]  # what the engine has, and what it had before


def test_every_rollout_is_on_disk_before_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_rollout_trainer(tmp_path, PROMPTS, regime={"max_lag": 1})
    step = PreferenceTrainer._step
    seen = []

    def checked(self: PreferenceTrainer, window: Any) -> None:
        committed = {commit["commit"] for commit, _ in read_log(tmp_path)}
        assert window.step in committed
        seen.append(window.step)
        step(self, window)

    monkeypatch.setattr(PreferenceTrainer, "_step", checked)
    train(trainer)
    assert seen == [0, 1, 2, 3, 4]


def test_a_window_without_a_pair_runs_and_teaches_nothing(tmp_path: Path) -> None:
    """limit 0: every response scores 0, every group is a tie."""
    trainer = make_rollout_trainer(tmp_path, PROMPTS, signals=[{"name": "low_tokens", "limit": 0}])
    before = trained_weights(trainer)
    rows = train(trainer)
    assert [row["credit/tie_frac"] for row in rows] == [1.0] * 5
    assert [row["loss/total"] for row in rows] == [0.0] * 5
    assert all(row["train/grad_norm"] == 0 for row in rows)
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(before[name], weight)


def test_a_failing_signal_drops_its_group_and_is_counted(tmp_path: Path) -> None:
    trainer = make_rollout_trainer(
        tmp_path,
        PROMPTS,
        signals=[{"name": "low_tokens", "broken": "prompt-3"}],
        regime={"max_failed_frac": 0.5},
    )
    rows = train(trainer)
    assert sum(row["rollout/failed_frac"] for row in rows) == pytest.approx(2 / 4)
    reasons = {g["failed"] for _, groups in read_log(tmp_path) for g in groups if g["failed"]}
    assert len(reasons) == 1 and "cannot be scored" in reasons.pop()


def test_too_many_failures_stop_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_rollout_trainer(
        tmp_path,
        PROMPTS,
        signals=[{"name": "low_tokens", "broken": "prompt-3"}],
        regime={"max_failed_frac": 0.2},
    )
    with pytest.raises(SignalError, match=r"1 of 4 groups .*prompt-3.*cannot be scored"):
        train(trainer)
    step = trainer.regime.step
    assert trainer.checkpoints.newest_step() == (step or None)


def test_groups_without_a_label_are_replaced_up_to_the_budget(tmp_path: Path) -> None:
    def trained(frac: float) -> tuple[float, int]:
        rows = train(
            make_rollout_trainer(
                tmp_path / str(frac),
                PROMPTS,
                regime={"resample_frac": frac, "samples_per_prompt": 2, "max_new_tokens": 2},
                signals=[{"name": "low_tokens", "limit": 8}],
            )
        )
        groups = [len(groups) for _, groups in read_log(tmp_path / str(frac))]
        assert max(groups) <= 4 * (1 + frac)
        pairs = sum(row["credit/pairs"] * n for row, n in zip(rows, groups, strict=True))
        return pairs, sum(groups)

    (few, sampled), (more, resampled) = trained(0.0), trained(1.0)
    assert sampled == 20 < resampled
    assert more > few


def test_rolled_in_tokens_are_context_not_loss(tmp_path: Path) -> None:
    trainer = make_rollout_trainer(tmp_path, PROMPTS, regime={"reset_frac": 1.0}, max_steps=1)
    train(trainer)
    log: ExperienceLog = trainer.regime.log  # type: ignore[attr-defined]
    batch = log.get(0)
    assert batch is not None
    for group in batch.groups:
        prompt = PROMPTS.prompts[group.start.row]
        assert group.start.prefix
        assert group.prompt_ids == prompt.ids + group.start.prefix
        assert all(len(c.logps) == len(c.ids) <= 6 for c in group.completions)


@pytest.mark.parametrize("kind", ["behavior", "synced", "initial"])
def test_references_follow_the_policy_as_they_say(tmp_path: Path, kind: str) -> None:
    """Online, the policy that sampled is the policy at the start of the step: log-ratio 0, loss log 2."""
    rows = train(make_rollout_trainer(tmp_path, PROMPTS, reference={"name": kind}, max_steps=6))
    follows = kind != "initial"
    for row in rows[1:]:
        assert (abs(row["loss/pairs"] - math.log(2)) < 1e-5) == follows
        assert (abs(row["log_ratio/chosen"]) < 1e-4) == follows


@pytest.mark.parametrize(
    "kind", ["behavior", *(pytest.param(k, marks=pytest.mark.slow) for k in ("synced", "ema"))]
)
def test_evaluations_between_steps_change_no_reference(tmp_path: Path, kind: str) -> None:
    """Batches are up to two steps old: an evaluation drops no policy that one of them was sampled by."""
    held_out = GroupList(random_pairs(6, seed=9))
    rows = {}
    for every in (None, 1):
        trainer = make_rollout_trainer(
            tmp_path / str(every),
            PROMPTS,
            regime={"max_lag": 2},
            reference={"name": kind},
            eval_source=held_out,
            eval_every=every,
            max_steps=4,
        )
        rows[every] = [row for row in train(trainer) if "loss/pairs" in row]
    assert [row["loss/pairs"] for row in rows[None]] == [row["loss/pairs"] for row in rows[1]]
    assert max(row["rollout/lag"] for row in rows[1]) == 2


def test_an_ema_reference_is_the_moving_average_of_every_steps_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ref <- 0.7 ref + 0.3 policy after each of five steps, by hand; in a run resumed after two just the same."""
    settings = {"reference": {"name": "ema", "ema_rate": 0.3}, "save_every": 2, "max_steps": 5}
    trainer = make_rollout_trainer(tmp_path, PROMPTS, keep_checkpoints=3, **settings)
    averages, step = [trained_weights(trainer)], trainer._step

    def followed(window: Any) -> None:
        step(window)
        now, held = trained_weights(trainer), averages[-1]
        averages.append({name: 0.7 * held[name] + 0.3 * now[name] for name in now})

    monkeypatch.setattr(trainer, "_step", followed)
    train(trainer)
    groups = random_pairs(6)
    first, third, last = (logps_with(averages[number], groups) for number in (0, 2, 5))
    newest = logps_with(trained_weights(trainer), groups)
    for other in (first, third, newest):
        assert (
            last - other
        ).abs().max() > 1e-3  # rates 0 and 1, and a resume that starts anew, would show
    resumed = make_rollout_trainer(tmp_path, PROMPTS, keep_checkpoints=3, **settings)
    resumed.restore(tmp_path / "checkpoints" / "step-2")
    at_resume = resumed.reference.logps([groups])[0]  # type: ignore[union-attr]
    torch.testing.assert_close(at_resume, third, rtol=0, atol=1e-5)
    train(resumed)
    for each in (trainer, resumed):
        (found,) = each.reference.logps([groups])  # type: ignore[union-attr]
        torch.testing.assert_close(found, last, rtol=0, atol=1e-5)


def logps_with(weights: dict[str, torch.Tensor], groups: list[Group]) -> torch.Tensor:
    """(R, T) of a fresh policy that holds ``weights``."""
    model = LogpModel(lora_llama()).eval()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        return model(pack(groups))


def test_a_reference_synced_every_second_push_lags_by_one(tmp_path: Path) -> None:
    rows = train(
        make_rollout_trainer(
            tmp_path, PROMPTS, reference={"name": "synced", "sync_every_pushes": 2}, max_steps=6
        )
    )
    at_reference = [abs(row["loss/pairs"] - math.log(2)) < 1e-5 for row in rows]
    assert at_reference == [True, False] * 3


def test_group_objectives_train_on_every_response(tmp_path: Path) -> None:
    rows = train(make_rollout_trainer(tmp_path, PROMPTS, objective={"name": "grpo"}))
    for row in rows:
        assert row["tokens/sample"] > 0
        assert row["rollout/policy_gap"] < 1e-5
        assert "loss/samples" in row


def test_splitting_groups_over_forwards_changes_nothing(tmp_path: Path) -> None:
    """Policy-gradient groups are cut to fit a forward; the step is the same."""
    rows = train(
        make_rollout_trainer(
            tmp_path / "split", PROMPTS, objective={"name": "grpo"}, micro_batch_tokens=24
        )
    )
    want = train(make_rollout_trainer(tmp_path / "whole", PROMPTS, objective={"name": "grpo"}))
    for row, other in zip(rows, want, strict=True):
        assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
        assert row["tokens/computed"] > other["tokens/computed"]  # a group's prompt once a piece


def test_offline_pairs_and_fresh_samples_share_a_step(tmp_path: Path) -> None:
    rows = train(
        make_rollout_trainer(
            tmp_path,
            PROMPTS,
            objective={"name": "hypo"},
            regime={"offline_pairs": True, "samples_per_prompt": 2},
            signals=[],
            pairs=GroupList(random_pairs(12)),
        )
    )
    for row in rows:
        assert row["tokens/chosen"] > 0
        assert row["tokens/sample"] > 0


def test_the_log_says_who_sampled_what_with_which_seed(tmp_path: Path) -> None:
    trainer = make_rollout_trainer(tmp_path, PROMPTS, regime={"sync_every": 2})
    train(trainer)
    for commit, groups in read_log(tmp_path):
        assert commit["version"] == commit["commit"] // 2 * 2
        assert set(commit["timings"]) == {"generate_s", "score_s"}
        for group in groups:
            seeds = [response["seed"] for response in group["responses"]]
            assert len(set(seeds)) == 4
            assert set(group["parts"]) == {"low_tokens"}
            json.dumps(group)


@pytest.mark.parametrize(("sync_every", "max_lag"), [(1, 0), (2, 0), (1, 1)])
def test_full_fine_tuning_samples_from_the_weights_it_should(
    tmp_path: Path, sync_every: int, max_lag: int
) -> None:
    """Shared weights online; whole models through the disk otherwise. On policy where the lag is 0."""
    torch.manual_seed(0)
    trainer = make_rollout_trainer(
        tmp_path,
        PROMPTS,
        model=tiny_model("llama", vocab_size=VOCABULARY),
        is_peft=False,
        regime={"sync_every": sync_every, "max_lag": max_lag},
        learning_rate=1e-3,
    )
    rows = train(trainer)
    for row in rows:
        assert (row["rollout/policy_gap"] < 1e-5) == (row["rollout/lag"] == 0)
        assert row.get("rollout/probe_gap_max", 0) < 1e-4
    assert (tmp_path / "policies").exists() == (sync_every > 1 or max_lag > 0)


def test_training_other_weights_than_those_that_sampled_is_refused(tmp_path: Path) -> None:
    """As a wrapper that keeps stale copies of its weights would."""
    trainer = make_rollout_trainer(tmp_path, PROMPTS)
    engine = trainer.regime.sampler.engine  # type: ignore[attr-defined]
    load = engine.load_policy

    def load_and_change(policy: Any) -> None:
        load(policy)
        if policy.version == 2:
            # What shares its weights with the trainer cannot go stale: change what it computes with them.
            head = engine.model.get_output_embeddings()
            head.register_forward_hook(lambda module, inputs, output: output * 1.5)

    engine.load_policy = load_and_change
    trainer.regime.probe.sequences = []  # type: ignore[attr-defined]  # it would be the first to tell
    with pytest.raises(TrainingError, match=r"step 3: the policy in training .* nats a token"):
        train(trainer)
    assert trainer.checkpoints.newest_step() == 2  # what came before the step that was given up


def test_stale_samples_are_dropped_and_counted_or_weighted(tmp_path: Path) -> None:
    """Lags run 0, 1, 2, 2, 2: above 1 nothing is trained on; a cap weights what is."""
    regime = {"max_lag": 2}
    rows = train(
        make_rollout_trainer(tmp_path / "drop", PROMPTS, regime={**regime, "drop_lag_above": 1})
    )
    assert [row["rollout/lag"] for row in rows] == [0, 1, 2, 2, 2]
    assert [row["rollout/dropped_stale_frac"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["loss/total"] == 0 for row in rows] == [False, False, True, True, True]
    rows = train(
        make_rollout_trainer(tmp_path / "cap", PROMPTS, regime={**regime, "importance_cap": 2.0})
    )
    assert rows[0]["rollout/importance"] == pytest.approx(1, abs=1e-4)
    assert all(0 < row["rollout/importance"] <= 2 for row in rows)
    assert abs(rows[-1]["rollout/importance"] - 1) > 1e-3


def every_objective() -> list[Any]:
    """Names; slow but for the first of those that need the same and take the same credit."""
    kinds: set[Any] = set()
    rows = []
    for name in sorted(set(OBJECTIVES) - {"reward_conditioned"}):
        spec = get_objective(name)
        kind = (spec.needs, spec.credit)
        rows.append(pytest.param(name, marks=[pytest.mark.slow] if kind in kinds else []))
        kinds.add(kind)
    return rows


@pytest.mark.parametrize("name", every_objective())
def test_every_objective_trains_on_rollouts(tmp_path: Path, name: str) -> None:
    """Any objective x any regime: what one cell needs beside the name is what the README's table says.

    But for reward_conditioned, which `prefopt check` refuses: its prompts hold the reward of their response.
    """
    extra: dict[str, Any] = REQUIRED.get(name, {})
    mixed = name == "hypo"
    trainer = make_rollout_trainer(
        tmp_path,
        PROMPTS,
        objective={"name": name, **extra},
        regime={"offline_pairs": mixed, "sync_every": 2},
        pairs=GroupList(random_pairs(12)) if mixed else None,
        max_steps=3,
    )
    before = trained_weights(trainer)
    rows = train(trainer)
    assert all(math.isfinite(row["loss/total"]) and row["train/grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(before[n], w) for n, w in trained_weights(trainer).items())


def test_weights_of_rollouts_are_their_scores_and_advantages(tmp_path: Path) -> None:
    """A score weighs as a reward does, and group_mean gives the advantage: both are those that were logged."""
    for name in ("wbc", "a_lol_ref_free"):
        trainer = make_rollout_trainer(
            tmp_path / name, PROMPTS, objective={"name": name}, max_steps=1
        )
        (row,) = train(trainer)
        responses = [r for g in logged_groups(trainer, 0) for r in g.responses]
        labels = [r.score if name == "wbc" else max(0.0, r.advantage or 0.0) for r in responses]
        assert row["weights/mean"] == pytest.approx(sum(labels) / len(labels), rel=1e-5)  # type: ignore[arg-type]
        assert row["samples/reward"] == pytest.approx(row["rollout/reward"], rel=1e-5)
