"""Rows as what signals score: prompt, texts, token ids and whether a response was cut.

Rows that were sampled here have their token ids. Others (rated data, pairs) have text alone: a renderer makes
their ids as training would, and without one whoever reads an id is told so, rather than given none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.base import Dropped
from data_pipelines.rows import Row, RowKind, asked_options, responses_of, user_fields
from prefopt.errors import DataError
from prefopt.recipe.thinking import mark_at_end
from prefopt.signals.base import UnknownIds
from prefopt.storage.packed import unpack_ids
from prefopt.types import Candidates, Prompt

if TYPE_CHECKING:
    from prefopt.data.render import Rendered, Renderer

READS_IDS = frozenset({"implicit_reward", "length_penalty", "repetition_penalty"})
"""Signals of ours that read token ids, for a check before anything loads; `UnknownIds` catches all others."""


def candidates(
    rows: Sequence[Row], kind: RowKind, renderer: Renderer | None = None
) -> list[Candidates | Dropped]:
    """What signals see of each row, in order; Dropped for a row that the chat template refuses.

    Args:
        rows: groups, or pairs (chosen first).
        kind: which of the two.
        renderer: makes the ids that rows lack, in one call of its tokenizer. Without it they are `UnknownIds`.

    Raises: DataError if the renderer's tokenizer is not the one that a row was sampled with.
    """
    responses = [responses_of(row, kind) for row in rows]
    made = _rendered(rows, responses, renderer) if renderer is not None else {}
    return [
        _candidates(row, found, made.get(index))
        for index, (row, found) in enumerate(zip(rows, responses, strict=True))
    ]


def _rendered(
    rows: Sequence[Row], responses: Sequence[Sequence[Mapping[str, Any]]], renderer: Renderer
) -> dict[int, Any]:
    """By row number, the ids of the prompt and of those responses that lack theirs (or why there are none)."""
    from prefopt.data.render import Request

    requests: dict[int, Request] = {}
    for index, (row, found) in enumerate(zip(rows, responses, strict=True)):
        missing = [each["text"] for each in found if "ids" not in each]
        if missing or "prompt_ids" not in row:
            chat = not isinstance(row["prompt"], str)
            turns: list[Any] = [
                {"role": "assistant", "content": text} if chat else text for text in missing
            ]
            requests[index] = Request(row["prompt"], tuple(turns), options=asked_options(row))
    return dict(zip(requests, renderer.render_batch(list(requests.values())), strict=True))


def _candidates(
    row: Row, responses: Sequence[Mapping[str, Any]], made: Rendered | Any | None
) -> Candidates | Dropped:
    from prefopt.data.rows import Refused

    if isinstance(made, Refused):
        return Dropped(str(made.reason), made.detail)
    unknown: Any = UnknownIds(
        f"a signal reads token ids, and row {row['id']} has text alone (only rows that `sample` made have "
        "ids, and `pair` leaves them out). Set score.tokenizer to the policy's model directory"
    )
    prompt_ids: Any = unknown if made is None else made.prompt_ids
    if "prompt_ids" in row:
        prompt_ids = unpack_ids(row["prompt_ids"])
        _require_same(row, prompt_ids, made)
    rendered = iter(made.responses) if made is not None else None
    content = row["prompt"]
    prompt = Prompt(
        id=row["id"],
        ids=prompt_ids,
        content=content if isinstance(content, str) else tuple(content),
        fields=user_fields(row),
        given=asked_options(row).given,
        source=row.get("source"),
    )
    return Candidates(
        prompt,
        tuple(each["text"] for each in responses),
        tuple(_ids(each, rendered, unknown) for each in responses),
        tuple(each.get("ended") is False for each in responses),
        tuple(_opened(each, content) for each in responses),
    )


def _opened(response: Mapping[str, Any], content: Any) -> str:
    """The mark after which a response was sampled: `sample` keeps a template's own, a plain text shows its end."""
    return response.get("opened") or (mark_at_end(content) if isinstance(content, str) else "")


def _ids(response: Mapping[str, Any], rendered: Iterator[Any] | None, unknown: Any) -> Any:
    if "ids" in response:
        return unpack_ids(response["ids"])
    if rendered is None:
        return unknown
    ids = next(rendered)
    # What was cut by the length limit has no end token; the renderer puts one on everything.
    return ids[:-1] if response.get("ended") is False else ids


def _require_same(row: Row, prompt_ids: tuple[int, ...], made: Rendered | None) -> None:
    if made is not None and made.prompt_ids != prompt_ids:
        raise DataError(
            f"row {row['id']}: was sampled after other prompt ids than score.tokenizer renders "
            f"({len(prompt_ids)} against {len(made.prompt_ids)}), so its responses' ids mean something else. Set "
            "it, and score.chat_template, to those of the model that sampled"
        )
