"""A gradient of exactly 0 stops a run where the objective asked for one, and only there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prefopt.data.groups import GroupList
from prefopt.errors import TrainingError
from prefopt.training.gradients import GradientWatch
from prefopt.training.windows import Window
from tests.unit.memory_trainer import lora_llama, make_trainer, random_pairs


def step(
    watch: GradientWatch, number: int, *, asked: float, norm: float | None, rate: float = 1e-3
) -> bool:
    """One step in which the objective's gradient on the outputs is ``asked``."""
    forward = torch.zeros(2, 3, requires_grad=True)
    watch.listen(forward)
    (forward.sum() * asked).backward()
    return watch.will_step(norm, rate, Window(number, 0.0, (), 1, 1))


def watch(model: nn.Module | None = None, num_steps: int = 10) -> GradientWatch:
    return GradientWatch(
        model or nn.Linear(2, 2), Accelerator(cpu=True), precision="fp32", num_steps=num_steps
    )


def test_three_steps_that_ask_and_get_nothing_stop_the_run() -> None:
    found = watch()
    assert step(found, 0, asked=1.0, norm=0.0)
    assert step(found, 1, asked=1.0, norm=0.0)
    with pytest.raises(
        TrainingError, match="step 3: the gradient is exactly 0 for 3 steps in a row"
    ):
        step(found, 2, asked=1.0, norm=0.0)


def test_a_gradient_in_between_begins_the_count_again() -> None:
    found = watch()
    norms = [0.0, 0.0, 0.5] * 4
    assert all(step(found, number, asked=1.0, norm=norm) for number, norm in enumerate(norms))


def test_steps_that_ask_for_nothing_go_on() -> None:
    """Every group tied, every margin beyond the hinge, no pairs: 0 is right as long as it lasts."""
    found = watch()
    assert all(step(found, number, asked=0.0, norm=0.0) for number in range(20))


def test_a_norm_that_nobody_took_is_not_judged() -> None:
    found = watch()
    assert all(step(found, number, asked=1.0, norm=None) for number in range(5))


def test_a_run_shorter_than_that_is_judged_by_all_its_steps() -> None:
    with pytest.raises(TrainingError, match="exactly 0 for 1 steps"):
        step(watch(num_steps=1), 0, asked=1.0, norm=0.0)


def test_a_saturated_hinge_trains_on_to_the_end(tmp_path: Path) -> None:
    """The objective's own 0: with a margin that every pair has passed, nothing is asked of the model."""
    model = lora_llama()
    options: dict[str, Any] = {"objective": {"name": "simpo", "beta": 2.0, "gamma": 0.0}}
    trainer = make_trainer(
        tmp_path, GroupList(random_pairs(8)), model=model, max_steps=4, **options
    )

    def saturated(seen: Any) -> Any:
        output = objective(seen)
        losses: Tensor = output.losses * 0.0
        return type(output)(losses, metrics=output.metrics)

    objective, trainer.objective = trainer.objective, saturated  # type: ignore[assignment]
    assert trainer.train().finished


def test_tensors_without_a_gradient_in_the_first_steps_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora_llama()
    model.tower = nn.Linear(4, 4)  # of images, say: trained, and no text passes through it
    caplog.set_level(logging.WARNING)
    make_trainer(
        tmp_path, GroupList(random_pairs(8)), objective={"name": "dpo"}, model=model, max_steps=7
    ).train()
    told = [r.getMessage() for r in caplog.records if "have had no gradient" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(
        "2 of 30 trained tensors have had no gradient in the first 5 steps, e.g. "
    )
    assert "tower.bias" in told[0]


def test_an_ordinary_run_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Warm-up included: with a rate of 0 a new adapter's A has no gradient yet, and no fault."""
    caplog.set_level(logging.WARNING)
    options: dict[str, Any] = {"objective": {"name": "dpo"}, "max_steps": 8, "warmup_frac": 0.5}
    make_trainer(tmp_path, GroupList(random_pairs(8)), **options).train()
    assert "no gradient" not in caplog.text
