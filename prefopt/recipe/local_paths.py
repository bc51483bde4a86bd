"""Whether a path of a recipe means this machine or the hub: the one answer, for checks and for what opens it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
"""Kinds of files that rows are read from."""


def is_local(path: str) -> bool:
    """Is this a path of this machine (there or not) rather than a hub id?

    What exists is; so is what begins like a path, and what no hub id can be: a pattern, three parts, a blank.
    """
    return (
        path.startswith((".", "~", os.sep))
        or _HUB_ID.fullmatch(path) is None
        or Path(path).exists()
    )


def is_local_data(path: str) -> bool:
    """As `is_local`; a data file's suffix also says that a path is meant."""
    return is_local(path) or data_suffix(path) is not None


def data_suffix(path: str | Path) -> str | None:
    """One of `DATA_SUFFIXES` (``.gz`` looked through); None for anything else."""
    name = str(path).lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    known = suffix in DATA_SUFFIXES and not (gzipped and suffix == ".parquet")
    return suffix if known else None
