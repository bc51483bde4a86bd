"""What a row of a shard may be: a prompt, a group of responses, a pair, or one weighted sample.

Rows are plain JSON objects, so that any tool can read a shard. The columns below are ours; every other
column of a row is the user's (``answer``, ``category``) and travels with it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prefopt.data.options import KeptControls, Omits, RenderOptions
from prefopt.data.template_columns import row_options
from prefopt.errors import DataError

Row: TypeAlias = dict[str, Any]


class RowKind(enum.StrEnum):
    """What every row of a stage's output is."""

    PROMPTS = "prompts"
    """``id``, ``prompt`` (text, or chat messages)."""
    GROUPS = "groups"
    """A prompt and ``responses``: objects with ``text`` and whatever is known of each: ``score``, ``model``."""
    PAIRS = "pairs"
    """A prompt with ``chosen`` and ``rejected`` (text), as `data.train` reads it."""
    SAMPLES = "samples"
    """A prompt with one ``response``, its ``reward``, ``value`` of the prompt and ``advantage``."""


OWN_COLUMNS = frozenset(
    {
        "id", "prompt", "prompt_ids", "responses", "chosen", "rejected", "score_chosen", "score_rejected",
        "info_chosen", "info_rejected", "response", "reward", "value", "advantage", "ended",
        "source",
    }
)  # fmt: skip
"""Columns that stages write. A column of the user's with one of these names is refused, not overwritten."""
SIDES = ("chosen", "rejected")


def user_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that travel with a row: those that are not ours, and which source it is from."""
    return {key: value for key, value in row.items() if key not in OWN_COLUMNS or key == "source"}


def asked_options(
    row: Mapping[str, Any], control_tokens: KeptControls = (), omits: Omits = "history"
) -> RenderOptions:
    """What a row's prompt is rendered with to be answered: its columns of tools, documents and keywords.

    Thoughts of earlier answers may be left out: templates of thinking models do so when they are asked.
    """
    if isinstance(row["prompt"], str):
        return RenderOptions(omits=omits, control_tokens=control_tokens)
    rules = RenderOptions(omits=omits, control_tokens=control_tokens)
    return row_options(row, f"row {row.get('id')}", rules)


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt's text; of a dialogue, its turns one after the other."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message.get("content") or "") for message in prompt)


def responses_of(row: Mapping[str, Any], kind: RowKind) -> list[dict[str, Any]]:
    """The responses of a group, the two sides of a pair (chosen first) or the one of a sample, as objects with
    ``text``."""
    if kind is RowKind.GROUPS:
        return row["responses"]
    if kind is RowKind.PAIRS:
        return [_side(row, side) for side in SIDES]
    if kind is RowKind.SAMPLES:
        return [{"text": row["response"], "score": row["reward"]}]
    raise DataError(f"row {row.get('id')}: {kind} have no responses")


def with_responses(row: Row, kind: RowKind, responses: Sequence[Mapping[str, Any]]) -> Row:
    """``row`` with what `responses_of` gave replaced."""
    if kind is RowKind.GROUPS:
        return {**row, "responses": [dict(each) for each in responses]}
    changed = dict(row)
    for side, response in zip(SIDES, responses, strict=True):
        changed |= side_columns(side, response)
    return changed


def side_columns(side: str, response: Mapping[str, Any]) -> Row:
    """The columns of one side of a pair: text, score where there is one, and the rest as ``info_<side>``."""
    columns: Row = {side: response["text"]}
    if response.get("score") is not None:
        columns[f"score_{side}"] = response["score"]
    info = {k: v for k, v in response.items() if k not in ("text", "score") and v is not None}
    return columns | ({f"info_{side}": info} if info else {})


def _side(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    found = {"text": row[side], **(row.get(f"info_{side}") or {})}
    score = row.get(f"score_{side}")
    return found if score is None else {**found, "score": score}


def require_columns(row: Mapping[str, Any], kind: RowKind, where: str) -> None:
    """Raises DataError naming what a row lacks to be of ``kind``."""
    missing = [name for name in _REQUIRED[kind] if name not in row]
    if missing:
        raise DataError(
            f"{where}: no column {missing[0]!r}; {kind} have {', '.join(_REQUIRED[kind])}, this row has "
            f"{', '.join(row) or 'nothing'}"
        )


_REQUIRED: dict[RowKind, tuple[str, ...]] = {
    RowKind.PROMPTS: ("id", "prompt"),
    RowKind.GROUPS: ("id", "prompt", "responses"),
    RowKind.PAIRS: ("id", "prompt", "chosen", "rejected"),
    RowKind.SAMPLES: ("id", "prompt", "response", "reward"),
}
