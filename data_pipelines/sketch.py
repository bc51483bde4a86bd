"""What keeps memory constant: hashes in arrays of eight bytes, and a sample that does not depend on order."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


def hash64(*parts: str) -> int:
    """64 bits of the parts; two different texts of a million fall together with a chance of 3 in 10^8."""
    data = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Hashes:
    """Hashes of rows, 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("Q")

    def add(self, value: int) -> None:
        self._values.append(value)

    def sorted(self) -> np.ndarray[Any, Any]:
        """(N,) uint64, rising."""
        return (
            np.sort(np.frombuffer(self._values, dtype=np.uint64))
            if self._values
            else np.empty(0, np.uint64)
        )

    def num_distinct(self) -> int:
        return len(np.unique(self.sorted()))


class BottomSample(Generic[T]):
    """The ``size`` items with the smallest hashes: a fair sample, the same in whatever order they come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[int, int, T]] = []
        self._count = 0

    def add(self, key: int, item: T) -> None:
        """Offers an item; ``key`` is its hash."""
        self._count += 1
        entry = (-key, -self._count, item)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def __iter__(self) -> Iterator[T]:
        """The sample, by hash."""
        return (item for _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))

    def __len__(self) -> int:
        return len(self._heap)
