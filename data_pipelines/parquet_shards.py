"""Shards as Parquet, all of a stage in one schema: what tools that read a folder as one table ask for.

The schema is known when the last row is. Until then a stage's shards are JSON lines, which workers write and a
kill leaves whole; at the end one process makes them Parquet, in two passes of one shard at a time.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.rows import Row
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_INSTEAD = "Parquet has one type a column: make them alike, or set format: jsonl"


def common_schema(shards: Iterable[Sequence[Row]], stage: str) -> pyarrow.Schema:
    """The schema of all rows: columns in the order they appear, whole numbers beside fractions as fractions.

    Raises: DataError naming row and column where values have no common type, or one that Parquet has not.
    """
    import pyarrow

    schema = pyarrow.schema([])
    for rows in shards:
        try:
            found = _table(rows, None).schema
            schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
        except _UNFIT as error:
            raise DataError(
                _odd_row(schema, rows, stage) or f"stage {stage!r}: {error}. {_INSTEAD}"
            ) from error
    for field in schema:
        if (empty := _without_fields(field.type, field.name)) is not None:
            raise DataError(
                f"stage {stage!r}: column {empty!r} holds {{}} in every row, and Parquet has no object without "
                "keys. Leave the column out, or set format: jsonl"
            )
    return schema


def parquet_bytes(rows: Sequence[Row], schema: pyarrow.Schema, stage: str) -> bytes:
    """A file of ``rows``; equal rows and schemas give equal bytes. Raises: DataError as `common_schema`."""
    import pyarrow.parquet

    try:
        sink = io.BytesIO()
        with pyarrow.parquet.ParquetWriter(sink, schema) as writer:
            if (
                rows
            ):  # of none, no row group: `datasets` takes the size of the first for its batches
                writer.write_table(_table(rows, schema))
    except _UNFIT as error:
        raise DataError(
            _odd_row(schema, rows, stage) or f"stage {stage!r}: {error}. {_INSTEAD}"
        ) from error
    return sink.getvalue()


# What Arrow's own errors are, too; a number beyond 64 bits is an OverflowError.
_UNFIT = (ValueError, TypeError, OverflowError, NotImplementedError, KeyError)


def _table(rows: Sequence[Row], schema: pyarrow.Schema | None) -> pyarrow.Table:
    """Not `Table.from_pylist`, which has the columns of the first row alone."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row) if schema is None else schema.names
    types = {} if schema is None else {field.name: field.type for field in schema}
    columns = {
        name: pyarrow.array([row.get(name) for row in rows], types.get(name)) for name in names
    }
    return pyarrow.table(columns, schema=schema)


def _odd_row(schema: pyarrow.Schema, rows: Sequence[Row], stage: str) -> str | None:
    """The first row whose values do not go with those of the others."""
    import pyarrow

    for settled in (
        False,
        True,
    ):  # a type that each value has may still be too narrow for one before it
        for row in rows:
            for name, value in row.items():
                try:
                    if not settled:
                        one = pyarrow.table({name: pyarrow.array([value])}).schema
                        schema = pyarrow.unify_schemas([schema, one], promote_options="permissive")
                    pyarrow.array([value], schema.field(name).type)
                except _UNFIT as error:
                    reason = " ".join(str(error).split())
                    return f"stage {stage!r}, row {row.get('id')}: column {name!r}: {reason}. {_INSTEAD}"
    return None


def _without_fields(kind: Any, name: str) -> str | None:
    """The dotted name of an object type without keys within a type; None where there is none."""
    import pyarrow

    if pyarrow.types.is_list(kind):
        return _without_fields(kind.value_type, name)
    if not pyarrow.types.is_struct(kind):
        return None
    if kind.num_fields == 0:
        return name
    inner = (_without_fields(field.type, f"{name}.{field.name}") for field in kind)
    return next((each for each in inner if each is not None), None)


def without_nulls(value: Any) -> Any:
    """A value without the keys that Parquet filled in because other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
