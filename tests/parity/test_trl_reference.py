"""Stored reference log-probs against those TRL computes, before training and during it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prefopt.reference.store import ReferenceStore
from prefopt.types import Group
from tests.parity.recorded_runs import (
    PAIRS_A_STEP,
    ListeningDPO,
    our_trainer,
    ragged_pairs,
    record_ours,
    rows_in_order,
    trl_trainer,
)

DPO = {"name": "dpo", "beta": 0.5}
# fp32 sums of some ten log-probs near 5 nats each.
TOLERANCE = {"rtol": 1e-5, "atol": 0.0}


def stored(run_dir: Path, groups: list[Group]) -> Tensor:
    """(P, 2) summed reference log-probs of chosen and rejected, from the files of the store."""
    # where, what and in which precision make_trainer says
    store = ReferenceStore(run_dir / "cache", "0" * 64, precision="auto")
    sums = []
    for group in groups:
        arrays = store.get(group)
        assert arrays is not None
        sums.append([float(arrays[row].sum()) for row in group.pairs[0]])
    return torch.tensor(sums)


def test_store_holds_what_trl_precomputes(tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO)
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows, beta=0.5, precompute_ref_log_probs=True)
    columns = [theirs.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    precomputed = torch.tensor([list(column) for column in columns]).T
    torch.testing.assert_close(stored(tmp_path, rows), precomputed, **TOLERANCE)


def test_store_holds_what_trl_recomputes_every_step(tmp_path: Path) -> None:
    """TRL's reference is the trained model with its adapter off: asked after training, it says the same."""
    trainer = our_trainer(tmp_path, ragged_pairs(), DPO)
    rows = rows_in_order(trainer)
    theirs = trl_trainer(ListeningDPO, tmp_path, rows, beta=0.5)
    theirs.record()
    record_ours(trainer, tmp_path)
    batches = list(theirs.get_train_dataloader())
    sums = [torch.stack(theirs.compute_ref_log_probs(theirs.model, batch), -1) for batch in batches]
    assert len(batches) * PAIRS_A_STEP == len(rows)
    torch.testing.assert_close(stored(tmp_path, rows), torch.cat(sums), **TOLERANCE)
