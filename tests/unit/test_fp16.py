"""fp16 with a loss scaler that starts too high: steps are skipped, counted, and given up on at last.

A CPU can do all of it except pass accelerate's guard (fp16 wants a GPU there), so the mode is switched on
after the guard: the autocast, the scaler and the trainer are those of a GPU run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from prefopt.data.groups import GroupList
from prefopt.errors import TrainingError
from prefopt.training.metrics import read_metrics
from prefopt.training.trainer import PreferenceTrainer
from tests.unit import memory_trainer
from tests.unit.memory_trainer import make_trainer, random_pairs, trained_weights

Fp16Trainer = Callable[..., PreferenceTrainer]


@pytest.fixture
def fp16_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fp16Trainer:
    """A trainer in ``tmp_path`` whose loss scale starts at ``scale`` and halves with every skipped step."""

    def make(scale: float, **settings: int) -> PreferenceTrainer:
        def accelerator(**options: bool) -> Accelerator:
            made = Accelerator(**options)
            made.native_amp = True
            made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
            monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
            return made

        monkeypatch.setattr(memory_trainer, "Accelerator", accelerator)
        simpo = {"name": "simpo", "beta": 2.0, "gamma": 1.0}
        source = GroupList(random_pairs(40))
        return make_trainer(tmp_path, source, objective=simpo, precision="fp16", **settings)

    return make


def test_overflowing_steps_are_skipped_until_the_scale_fits(
    fp16_trainer: Fp16Trainer, tmp_path: Path
) -> None:
    trainer = fp16_trainer(2.0**24, max_steps=30)
    taken = trainer.optimizer.step

    def step() -> None:
        before = trained_weights(trainer)
        taken()
        same = all(torch.equal(w, before[name]) for name, w in trained_weights(trainer).items())
        # The learning rate of step 0 is 0, whatever the gradient.
        assert same == (trainer.optimizer.step_was_skipped or trainer.regime.step == 1)

    trainer.optimizer.step = step
    trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    skipped = [row["train/skipped_steps"] for row in rows]
    assert skipped[0] == 1
    assert 0 < sum(skipped) < 15
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - sum(skipped))
    # A skipped step has no gradient norm; the others have one in the units of the loss, not of the scale.
    norms = {row["step"]: row.get("train/grad_norm") for row in rows}
    assert [norm is None for norm in norms.values()] == [bool(skip) for skip in skipped]
    assert max(norm for norm in norms.values() if norm is not None) < 100
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]


def test_overflow_that_never_ends_stops_the_run_and_says_what_to_do(
    fp16_trainer: Fp16Trainer, tmp_path: Path
) -> None:
    trainer = fp16_trainer(2.0**100, max_steps=30)
    start = trained_weights(trainer)
    with pytest.raises(
        TrainingError,
        match=r"step 21: the gradient norm is (inf|nan); fp16 overflows; set train.precision = bf16. "
        r"Rows of this step on this process: pair-\d+",
    ):
        trainer.train()
    assert [row["train/skipped_steps"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        1
    ] * 20
    assert all(torch.equal(w, start[name]) for name, w in trained_weights(trainer).items())
