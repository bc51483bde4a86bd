"""Rows in another order than they come in, in constant memory: through files on disk, in two linear passes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipelines.rows import Row
from prefopt.storage.cache import AGAIN, writing

_BUCKET_ROWS = 20_000
"""Rows in memory at a time: a hundred megabytes of long dialogues."""
_MOST_BUCKETS = 400
"""Files open at a time; more rows than both allow make the buckets larger."""


def reordered(rows: Iterable[Row], ranks: np.ndarray[Any, Any], scratch: Path) -> Iterator[Row]:
    """The rows in order of their ranks.

    Args:
        rows: read once.
        ranks: (N,) int64, one a row as it comes: its place in the result, 0-based and without gaps; -1 leaves
            the row out.
        scratch: a folder of this call's own; emptied before and after.

    Raises: DataError if the disk is full.
    """
    count = int((ranks >= 0).sum())
    size = max(_BUCKET_ROWS, -(-count // _MOST_BUCKETS))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        paths = [scratch / f"{number:05d}" for number in range(-(-count // size))]
        _spread(rows, ranks, paths, size)
        for path in paths:
            yield from _sorted_bucket(path)
            path.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ranks_of(keys: np.ndarray[Any, Any], *, descending: bool) -> np.ndarray[Any, Any]:
    """(N,) int64 rank of each key; equal keys keep the order they came in, whichever way is up."""
    order = np.argsort(-keys if descending else keys, kind="stable")
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys))
    return ranks


def _spread(rows: Iterable[Row], ranks: np.ndarray[Any, Any], paths: list[Path], size: int) -> None:
    with contextlib.ExitStack() as stack:
        files: list[IO[str]] = [stack.enter_context(p.open("w", encoding="utf-8")) for p in paths]
        for row, rank in zip(rows, ranks.tolist(), strict=True):
            if rank < 0:
                continue
            with writing(paths[0].parent, AGAIN):
                files[rank // size].write(f"{rank}\t{json.dumps(row, ensure_ascii=False)}\n")


def _sorted_bucket(path: Path) -> Iterator[Row]:
    found: list[tuple[int, str]] = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            rank, _, text = line.partition("\t")
            found.append((int(rank), text))
    found.sort()
    for _, text in found:
        yield json.loads(text)
