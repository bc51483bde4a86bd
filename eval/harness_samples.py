"""lm-evaluation-harness's ``samples_*.jsonl`` as rows of responses: the document, and what the model said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from prefopt.data.readers import RawRow
from prefopt.data.rows import shown
from prefopt.errors import DataError


def unwrapped(rows: Iterable[RawRow]) -> list[RawRow]:
    """The rows, and in place of lm_eval's own (a ``doc`` and its ``resps``) that document with its ``response``.

    lm_eval writes a document once a filter, with the same response before all of them: one row is kept.

    Raises: DataError for a row whose ``resps`` hold no text or several, or another response than the same
        document's row before it.
    """
    found: list[RawRow] = []
    first: dict[str, RawRow] = {}
    for row in rows:
        doc = row.data.get("doc")
        if not isinstance(doc, Mapping) or "resps" not in row.data:
            found.append(row)
            continue
        plain = replace(row, data={**doc, "response": _response(row)})
        known = first.setdefault(str(row.data.get("doc_id", row.number)), plain)
        if known is plain:
            found.append(plain)
        elif known.data != plain.data:
            raise DataError(
                f"{row.where}: doc_id {row.data['doc_id']} has another response than at {known.where}: samples of "
                "several runs in one file? Give one run's"
            )
    return found


def _response(row: RawRow) -> str:
    """The one text in ``resps``, before any filter."""
    value: Any = row.data["resps"]
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    raise DataError(
        f"{row.where}: resps = {shown(row.data['resps'])}: must hold one text: what the model said. Several "
        "samples a document, and log-probs of choices, are not read; run the task itself: prefopt eval MODEL"
    )
