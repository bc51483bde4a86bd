"""The columns of a row that its chat template is given: tools, documents, keywords."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefopt.data.messages import kind_of, without_nulls
from prefopt.data.options import PLAIN, RESERVED, TEMPLATE_COLUMNS, RenderOptions
from prefopt.data.readers import RawRow
from prefopt.data.rows import column, has_column
from prefopt.errors import DataError
from prefopt.recipe.schema import ColumnMap


def template_columns(row: RawRow, columns: ColumnMap, rules: RenderOptions) -> RenderOptions:
    """``rules`` with what the row's columns give to the template.

    Raises: DataError naming file, row and column for what is no list of objects (tools, documents) or no object
        (keywords), as they are or as JSON text.
    """
    found = []
    for default, path in zip(
        TEMPLATE_COLUMNS,
        (columns.tools, columns.documents, columns.chat_template_kwargs),
        strict=True,
    ):
        value = None
        if path is not None and (path != default or has_column(row.data, path)):
            value = _parsed(row, path, column(row, path))
        found.append(without_nulls(value) if row.filled_nulls else value)
    tools, documents, keywords = found
    return replace(
        rules,
        tools=_objects(row, str(columns.tools), tools),
        documents=_objects(row, str(columns.documents), documents),
        keywords=_keywords(row, str(columns.chat_template_kwargs), keywords),
    )


def row_options(row: Mapping[str, Any], where: str, rules: RenderOptions = PLAIN) -> RenderOptions:
    """`template_columns` of a row that has them under their own names (a pipeline's)."""
    return template_columns(RawRow(where, 0, dict(row)), ColumnMap(), rules)


def _parsed(row: RawRow, path: str, value: Any) -> Any:
    """``value``, out of JSON text where it is one; None for an empty text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{row.where}: column {path!r}: the chat template is given what it says, and it is no JSON: {error}. "
            f"{_leave_out(path)}"
        ) from error


def _objects(row: RawRow, path: str, value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    items = [_parsed(row, path, item) for item in value] if isinstance(value, list) else None
    if items is None or not all(isinstance(item, dict) for item in items):
        raise DataError(
            f"{row.where}: column {path!r} holds {kind_of(value)}, and the chat template is given it as a list of "
            f"objects. {_leave_out(path)}"
        )
    return tuple(items)


def _keywords(row: RawRow, path: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or RESERVED & value.keys():
        what = kind_of(value) if not isinstance(value, dict) else min(RESERVED & value.keys())
        raise DataError(
            f"{row.where}: column {path!r} holds {what}: it must be an object of keywords of the chat "
            f"template, and none of {', '.join(sorted(RESERVED))}. {_leave_out(path)}"
        )
    return {key: each for key, each in value.items() if each is not None}


def _leave_out(path: str) -> str:
    if path in TEMPLATE_COLUMNS:
        return f"If it is something else, set columns.{path}: null"
    return "Name the right one under columns"
