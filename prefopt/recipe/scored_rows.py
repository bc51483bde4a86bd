"""What the signals of a recipe read of a row, and whether one of them judges it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.recipe.only_where import SOURCE, nobody_judges
from prefopt.recipe.registry import BoundSignal


def part_names(signals: Sequence[BoundSignal]) -> list[str]:
    """What each signal's part of the reward is called: two of one name become ``name`` and ``name_2``."""
    used: Counter[str] = Counter()
    names: list[str] = []
    for entry in signals:
        used[entry.name] += 1
        number = used[entry.name]
        names.append(entry.name if number == 1 else f"{entry.name}_{number}")
    return names


def columns_read(
    signals: Sequence[BoundSignal], row: Mapping[str, Any], source: str | None = None
) -> list[str]:
    """The columns that the signals for this row read: it must have them."""
    mine = [entry for entry in signals if entry.rows.include(row, source)]
    return list(dict.fromkeys(name for entry in mine for name in entry.columns))


def columns_named(signals: Sequence[BoundSignal]) -> list[str]:
    """Every column that some signal reads, or is told apart by: rows keep them where they have them."""
    found = [name for entry in signals for name in (*entry.columns, *entry.rows.columns)]
    return list(dict.fromkeys(found))


def unjudged(
    signals: Sequence[BoundSignal], row: Mapping[str, Any], source: str | None = None
) -> str | None:
    """Why no signal judges this row, as a sentence; None where one does, and without any signal."""
    rows = [entry.rows for entry in signals]
    return nobody_judges(dict(zip(part_names(signals), rows, strict=True)), row, source)


def reads_source(signals: Sequence[BoundSignal]) -> bool:
    """Does some signal go by what a data source is called?"""
    return any(SOURCE in entry.rows.columns for entry in signals)
