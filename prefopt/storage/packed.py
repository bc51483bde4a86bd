"""Token ids and log-probs inside JSON: base64 of little-endian int32 and float32, exact and small."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np


def pack_ids(ids: Iterable[int]) -> str:
    """Token ids as text: as large as the text they stand for, a tenth of the memory of a list of numbers."""
    return _packed(ids, "<i4")


def unpack_ids(text: str) -> tuple[int, ...]:
    """The ids of `pack_ids`."""
    return _unpacked(text, "<i4")


def pack_floats(values: Iterable[float]) -> str:
    """fp32 numbers as text."""
    return _packed(values, "<f4")


def unpack_floats(text: str) -> tuple[float, ...]:
    """The numbers of `pack_floats`."""
    return _unpacked(text, "<f4")


def _packed(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str) -> tuple[Any, ...]:
    return tuple(np.frombuffer(base64.b64decode(text), dtype).tolist())
