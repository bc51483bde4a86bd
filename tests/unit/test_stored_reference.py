"""A stored reference: each row gets its own log-probs, found by row, its tokens hashed once a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from prefopt.data.groups import GroupList
from prefopt.model.collate import pack
from prefopt.model.logps import LogpModel
from prefopt.model.micro_batches import SplitLimits
from prefopt.reference import store as store_module
from prefopt.reference.store import ReferenceStore
from prefopt.reference.stored import StoredReference
from prefopt.types import Group
from tests.unit.memory_trainer import lora_llama, make_trainer, random_pairs

LIMITS = SplitLimits(256)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Grows by one whenever the tokens of a response are hashed."""
    calls: list = []
    original = store_module.response_key

    def counted(prompt_ids, response):
        calls.append(response)
        return original(prompt_ids, response)

    monkeypatch.setattr(store_module, "response_key", counted)
    return calls


def filled(root: Path, *sources: GroupList) -> tuple[StoredReference, list[int]]:
    """A reference over ``sources`` and how many groups of each it had to compute."""
    reference = StoredReference(ReferenceStore(root, "a" * 64), is_initial_policy=True)
    model = LogpModel(lora_llama())
    rows = [range(len(source)) for source in sources]
    counts = [
        reference.fill(model, source, each, LIMITS, Accelerator(cpu=True))
        for source, each in zip(sources, rows, strict=True)
    ]
    return reference, counts


def own_logps(groups: list[Group]) -> torch.Tensor:
    with torch.no_grad():
        return LogpModel(lora_llama().eval())(pack(groups))


def test_a_rows_tokens_are_hashed_once_a_run_however_often_it_is_trained_on(
    tmp_path: Path, hashed: list[Group]
) -> None:
    """Once to ask the store, once more to write what it lacked; three epochs and the evaluations add none."""
    train, held_out = GroupList(random_pairs(16)), GroupList(random_pairs(4, seed=1))
    for run, times in (("first", 2), ("second", 1)):
        trainer = make_trainer(
            tmp_path / run, train, eval_source=held_out, objective={"name": "dpo"}, num_epochs=3
        )
        asked = len(hashed)
        assert asked == times * 2 * 20
        trainer.train()
        assert len(hashed) == asked
        hashed.clear()
        (tmp_path / "second").mkdir(exist_ok=True)
        if run == "first":
            (tmp_path / run / "cache").rename(tmp_path / "second" / "cache")


def test_rows_of_two_sources_are_not_mixed_up_though_ids_and_numbers_are_the_same(
    tmp_path: Path,
) -> None:
    one, other = GroupList(random_pairs(5)), GroupList(random_pairs(5, seed=1))
    assert [g.id for g in one.groups] == [g.id for g in other.groups]
    reference, _ = filled(tmp_path, one, other)
    batches = [one.groups[3:], other.groups[:2], other.groups[3:], one.groups[:1]]
    for groups, found in zip(batches, reference.logps(batches), strict=True):
        torch.testing.assert_close(found, own_logps(list(groups)), rtol=0, atol=1e-5)


def test_what_is_read_back_is_what_was_computed_to_the_bit(tmp_path: Path) -> None:
    source = GroupList(random_pairs(12))
    first, computed = filled(tmp_path, source)
    _, recomputed = filled(tmp_path, GroupList(random_pairs(12)))
    assert (computed, recomputed) == ([12], [0])
    (one,) = first.logps([source.groups])
    arrays = [a for g in source.groups for a in ReferenceStore(tmp_path, "a" * 64).get(g) or ()]
    for row, array in zip(one, arrays, strict=True):
        assert np.array_equal(row[: len(array)].numpy(), array)
        assert not row[len(array) :].any()


def test_a_row_that_was_not_asked_for_is_no_other_rows(tmp_path: Path) -> None:
    source = GroupList(random_pairs(4))
    reference = StoredReference(ReferenceStore(tmp_path, "a" * 64), is_initial_policy=True)
    reference.fill(LogpModel(lora_llama()), source, [0, 2], LIMITS, Accelerator(cpu=True))
    with pytest.raises(KeyError):
        reference.logps([source.groups[1:2]])


def test_a_damaged_part_is_whole_again_after_one_run(tmp_path: Path) -> None:
    """Rows read before the damage showed are written again, not computed again."""
    source = GroupList(random_pairs(12))
    filled(tmp_path, source)
    (part,) = tmp_path.rglob("*.safetensors")
    raw = bytearray(part.read_bytes())
    last = ReferenceStore(tmp_path, "a" * 64).get(source.group(11))
    assert last is not None
    raw[raw.index(last[1].tobytes())] ^= 1
    part.write_bytes(raw)
    _, computed = filled(tmp_path, source)
    assert computed == [1]
    _, computed = filled(tmp_path, source)
    assert computed == [0]
