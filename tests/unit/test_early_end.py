"""A run that ends early, in the midst of a step or an evaluation, goes on as if it had not.

In one process; launches are in tests/distributed/test_failures.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.data.groups import GroupList
from prefopt.process.progress import progress
from prefopt.training.metrics import read_metrics
from prefopt.training.trainer import PreferenceTrainer, TrainResult
from tests.unit.memory_trainer import make_trainer, random_pairs, trained_weights

PAIRS, HELD_OUT = GroupList(random_pairs(16)), GroupList(random_pairs(6, seed=1))


def trainer_in(directory: Path) -> PreferenceTrainer:
    """Six steps of four micro-batches, dropout on, an evaluation of three batches after every second."""
    directory.mkdir(exist_ok=True)
    trainer = make_trainer(
        directory, PAIRS, objective={"name": "dpo", "beta": 0.1}, eval_source=HELD_OUT,
        micro_batch_size=2, num_epochs=3, log_every=2,
    )  # fmt: skip
    trainer.eval_every = 2
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return trainer


def computed(directory: Path) -> list[dict[str, Any]]:
    measured = ("time/", "memory/", "tokens/per_s")
    rows = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def at_call(
    number: int, function: Callable[..., Any], fault: Callable[[], None]
) -> Callable[..., Any]:
    """``function``, with a fault before its call of that number."""
    calls = iter(range(1, 1000))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            fault()
        return function(*arguments, **options)

    return called


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def finish(directory: Path) -> PreferenceTrainer:
    """What the same command does next."""
    trainer = trainer_in(directory)
    assert trainer.train(trainer.checkpoints.newest()) == TrainResult(6, True, 6)
    return trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    return computed_and_trained(directory, finish(directory))


def computed_and_trained(
    directory: Path, trainer: PreferenceTrainer
) -> tuple[list[Any], dict[str, Any]]:
    return computed(directory), trained_weights(trainer)


def assert_same(
    got: tuple[list[Any], dict[str, Any]], want: tuple[list[Any], dict[str, Any]]
) -> None:
    assert got[0] == want[0]
    assert all(torch.equal(got[1][name], tensor) for name, tensor in want[1].items())


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_signal_within_a_step_saves_what_came_before_it(
    micro_batch: int, tmp_path: Path, undisturbed: Any
) -> None:
    """Heard before the next forward; in the last one, after the step."""
    trainer = trainer_in(tmp_path)
    call = 3 + 8 + 3 + micro_batch  # an evaluation, two steps, another evaluation
    trainer.objective = at_call(call, trainer.objective, terminate)  # type: ignore[assignment]
    step = 3 if micro_batch == 4 else 2
    assert trainer.train() == TrainResult(step, False, step, signal.SIGTERM)
    assert trainer.checkpoints.newest_step() == step
    assert_same(computed_and_trained(tmp_path, finish(tmp_path)), undisturbed)


def test_a_signal_within_the_first_step_has_nothing_to_save(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.objective = at_call(4, trainer.objective, terminate)  # type: ignore[assignment]
    assert trainer.train() == TrainResult(0, False, 0, signal.SIGTERM)
    assert trainer.checkpoints.newest_step() is None


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_signal_within_an_evaluation_leaves_it_to_the_next_start(
    batch: int, tmp_path: Path, undisturbed: Any
) -> None:
    trainer = trainer_in(tmp_path)
    trainer.objective = at_call(3 + 8 + batch, trainer.objective, terminate)  # type: ignore[assignment]
    assert trainer.train() == TrainResult(2, False, 2, signal.SIGTERM)
    assert [row["step"] for row in computed(tmp_path)] == [0]
    assert_same(computed_and_trained(tmp_path, finish(tmp_path)), undisturbed)


def test_an_error_within_a_step_saves_what_came_before_it(tmp_path: Path, undisturbed: Any) -> None:
    def out_of_memory() -> None:
        torch.empty(2**58)

    trainer = trainer_in(tmp_path)
    trainer.objective = at_call(3 + 8 + 3 + 6, trainer.objective, out_of_memory)  # type: ignore[assignment]
    with pytest.raises(Exception, match="out of memory in step 4: a forward over 2 rows"):
        trainer.train()
    assert trainer.checkpoints.newest_step() == 3
    assert progress.stands.startswith("saved step 3 of 6 in")
    assert_same(computed_and_trained(tmp_path, finish(tmp_path)), undisturbed)


def test_an_error_after_the_update_saves_nothing(tmp_path: Path) -> None:
    """The optimizer has changed some weights and not others: there is no step that they are of."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    trainer = trainer_in(tmp_path)
    trainer.optimizer.step = fail
    with pytest.raises(Exception, match="The optimizer's state is what is new there"):
        trainer.train()
    assert trainer.checkpoints.newest_step() is None
