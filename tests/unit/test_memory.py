"""Out of memory says which rows, how many tokens, and what to set."""

from __future__ import annotations

import pytest
import torch

from prefopt.errors import TrainingError
from prefopt.model.memory import memory_for, memory_for_state
from prefopt.model.micro_batches import SplitLimits
from prefopt.types import Group, Response

ROWS = [
    Group(f"pairs.jsonl:{n}", (1,) * 10, (Response((2,) * n), Response((2,) * n)), ((0, 1),))
    for n in (100, 50)
]


def said(groups: list[Group], error: Exception, **options: object) -> str:
    limits = SplitLimits(512, packed=bool(options.pop("packed", True)))
    with (
        pytest.raises(TrainingError) as caught,
        memory_for("in step 7", groups, limits, **options),  # type: ignore[arg-type]
    ):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError(),
    ],
)
def test_every_allocator_is_understood_and_its_own_words_are_kept(error: Exception) -> None:
    text = said(ROWS, error)
    assert text.startswith(
        "out of memory in step 7: a forward over 2 rows and 320 tokens (train.micro_batch_tokens = 512): "
        "pairs.jsonl:100 (210 tokens), pairs.jsonl:50 (110 tokens). Set train.micro_batch_tokens = 210"
    )
    assert text.endswith((str(error) or "MemoryError").splitlines()[0])


def test_the_remedy_is_the_nearest_that_there_is() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert "gradient_checkpointing = true" in said(ROWS, error, backward=False)
    assert "gradient_checkpointing" not in said(ROWS, error, backward=True)
    assert "gradient_checkpointing" not in said(ROWS, error)  # no backward, nothing to recompute
    alone = said(ROWS[:1], error, backward=True)
    assert "one row alone" in alone and "data.max_length_tokens" in alone
    assert "Set train.micro_batch_tokens" not in alone
    assert "model.layout = packed" in said(ROWS[:1], error, packed=False)
    assert "(220 tokens)" in said(ROWS[:1], error, packed=False)  # the prompt is there twice


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_for("in step 7", ROWS):
        raise RuntimeError("shapes do not fit")
    with (
        pytest.raises(TrainingError, match=r"out of memory in the update\. Buy more\. "),
        memory_for_state("in the update", "Buy more"),
    ):
        torch.empty(2**58)


def test_memory_that_the_system_refuses_is_recognised_as_such() -> None:
    """What torch's CPU allocator really says."""
    with (
        pytest.raises(TrainingError, match="out of memory in step 7"),
        memory_for("in step 7", ROWS),
    ):
        torch.empty(2**58)
