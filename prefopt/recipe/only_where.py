"""For which rows a signal is: the key ``only_where`` of an entry of ``signals``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import Field

SOURCE = "source"
"""Beside the names of columns: what the row's data source is called, where no column of that name says it."""

Cell: TypeAlias = bool | int | float | str | None
_Name = Annotated[str, Field(min_length=1)]
OnlyWhere: TypeAlias = (
    _Name
    | Annotated[dict[_Name, Cell | Annotated[list[Cell], Field(min_length=1)]], Field(min_length=1)]
)
"""A column that must hold something, or values of columns: one value or a list of them, all columns must fit."""


@dataclass(frozen=True)
class Rows:
    """The rows that a signal scores."""

    where: str | Mapping[str, Any] | None = None
    """``only_where`` as it is written; None: every row."""
    of_form: bool = False
    """The signal says how an answer is written and not whether it is good, so it alone judges no row that
    ``only_where`` does not name."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``only_where`` names."""
        return (self.where,) if isinstance(self.where, str) else tuple(self.where or ())

    def include(self, row: Mapping[str, Any], source: str | None = None) -> bool:
        """Is the signal for this row?

        Args:
            row: its columns.
            source: what the data source that it is from is called.
        """
        if self.where is None:
            return True
        if isinstance(self.where, str):
            return _is_there(_value(row, self.where, source))
        return all(
            any(_is(_value(row, name, source), each) for each in _listed(wanted))
            for name, wanted in self.where.items()
        )


def nobody_judges(
    signals: Mapping[str, Rows], row: Mapping[str, Any], source: str | None = None
) -> str | None:
    """Why no signal judges this row, as a sentence; None where one does.

    A penalty on form without ``only_where`` is for every row, and judges none where other signals do.

    Args:
        signals: the rows of each signal, by its name.
        row, source: see `Rows.include`.
    """
    if all(rows.where is None for rows in signals.values()):
        return None
    mine = [rows for rows in signals.values() if rows.include(row, source)]
    if any(rows.where is not None or not rows.of_form for rows in mine):
        return None
    wanted = "; ".join(
        f"{name} is for {_said(rows.where)}"
        for name, rows in signals.items()
        if rows.where is not None
    )
    held = ", ".join(name for name, value in row.items() if _is_there(value)) or "none"
    named = "" if source is None else f", its source is {source!r}"
    return (
        f"its columns with a value are {held}{named}; {wanted}. Add a signal for such rows, widen an only_where, "
        "or leave the rows out"
    )


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, None where it is not there; a dot descends unless a name has it literally."""
    value: Any = row
    while isinstance(value, Mapping) and path not in value and "." in path:
        head, path = path.split(".", 1)
        value = value.get(head)
    return value.get(path) if isinstance(value, Mapping) else None


def _value(row: Mapping[str, Any], name: str, source: str | None) -> Any:
    own = value_at(row, name)
    return source if name == SOURCE and not _is_there(own) else own


def _is_there(value: Any) -> bool:
    """A table fills the cells of other tasks with null, CSV with empty text, some data sets with empty lists."""
    return value is not None and not (isinstance(value, str | list | Mapping) and not value)


def _is(value: Any, wanted: Cell) -> bool:
    """Equal, and not by Python's reading of true as 1; null is what `_is_there` denies."""
    if wanted is None:
        return not _is_there(value)
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _said(where: Any) -> str:
    if isinstance(where, str):
        return f"rows with {where!r}"
    return "rows with " + " and ".join(f"{name} = {value!r}" for name, value in where.items())
