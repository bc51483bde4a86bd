"""Messages of a dialogue, out of whatever shape a data set keeps them in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefopt.data.readers import RawRow
from prefopt.data.rows import Message, shown
from prefopt.data.said import CALLS, SPOKEN
from prefopt.errors import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's speaker names and the roles chat templates know them by."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def messages(row: RawRow, format: str, name: str, value: Any, role: str) -> list[Message]:
    """A column as messages; a plain string becomes one turn of ``role`` (or a parsed transcript)."""
    if value is None:
        return []
    if isinstance(value, str):
        refuse_written_out(row, name, value)
        if format == "hh":
            return _transcript(value) if is_transcript(value) else [turn(role, value.strip())]
        return [turn(role, value)]
    items = value if isinstance(value, list) else [value]
    convert = _CONVERT.get(format)
    if convert is None or not all(isinstance(item, dict) for item in items):
        raise DataError(
            f"{row.where}: column {name!r} holds {kind_of(value)}; format {format!r} takes "
            f"{'transcripts (strings)' if convert is None else 'strings or lists of messages'}"
        )
    return [convert(row, name, item) for item in items]


_WRITTEN_OUT = re.compile(r"""\s*\[?\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
_BOTH_KEYS = (("role", "content"), ("from", "value"))


def refuse_written_out(row: RawRow, name: str, value: Any) -> None:
    """Raises DataError for messages as text, in JSON's or Python's notation: what CSV makes of lists.

    Taken as what somebody says, brackets and roles would be trained on.
    """
    if not isinstance(value, str) or _WRITTEN_OUT.match(value) is None:
        return
    if any(
        all(f"{mark}{key}{mark}" in value for key in keys) for keys in _BOTH_KEYS for mark in "'\""
    ):
        raise DataError(
            f"{row.where}: column {name!r} holds a list of messages written out as text: {shown(value)}. Save the "
            "rows as JSON Lines or Parquet, where a list stays a list; if that text itself is meant, set "
            "format: text"
        )


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat_message(row: RawRow, name: str, item: dict[str, Any]) -> Message:
    # Who calls a tool, or thinks, need not say anything.
    says = "content" in item or any(item.get(key) for key in (*SPOKEN, *CALLS))
    if not isinstance(item.get("role"), str) or not says:
        hint = "; from/value turns are format: sharegpt" if "from" in item else ""
        raise DataError(
            f"{row.where}: column {name!r}: a message needs role and content, this one has "
            f"{', '.join(item) or 'nothing'}{hint}"
        )
    refuse_media(row, item, f"a message in column {name!r}")
    # Templates ask whether a key is defined, and files write out keys that other rows have.
    rest = {key: value for key, value in item.items() if value is not None}
    rest = without_nulls(rest) if row.filled_nulls else rest
    return {**rest, "role": item["role"], "content": _content(row, name, item.get("content"))}


def _sharegpt_message(row: RawRow, name: str, item: dict[str, Any]) -> Message:
    if "from" not in item or "value" not in item:
        hint = "; role/content messages are format: chat" if "role" in item else ""
        raise DataError(
            f"{row.where}: column {name!r}: a ShareGPT turn needs from and value, this one has "
            f"{', '.join(item) or 'nothing'}{hint}"
        )
    refuse_media(row, item, f"a message in column {name!r}")
    role = ROLES.get(str(item["from"]).lower())
    if role is None:
        raise DataError(
            f"{row.where}: column {name!r}: from = {item['from']!r} is no known speaker; "
            f"known: {', '.join(ROLES)}"
        )
    flags = {key: item[key] for key in LOSS_FLAGS if item.get(key) is not None}
    return {**turn(role, _content(row, name, item["value"])), **flags}


def _content(row: RawRow, name: str, value: Any) -> str:
    """Text of a message; a list of text parts is joined, anything that is not text is an error."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    others = [part for part in parts if not _is_text(part)]
    if not others:
        return "".join(part["text"] for part in parts)
    other = others[0]
    kind = other.get("type") if isinstance(other, dict) else None
    what = f"has a part of type {kind!r}" if kind is not None else f"is {kind_of(value)}"
    raise DataError(
        f"{row.where}: column {name!r}: the content of a message {what}; only text is supported"
    )


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in _TEXT_TYPES
        and isinstance(part.get("text"), str)
    )


_TEXT_TYPES = (None, "text", "input_text", "output_text")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def refuse_media(row: RawRow, values: Mapping[str, Any], where: str) -> None:
    """Raises DataError for what a policy of text cannot be shown."""
    for name in _MEDIA:
        if values.get(name):
            raise DataError(
                f"{row.where}: {where} holds {name!r}: only text is supported, and an answer to what the policy "
                "never sees would teach it to make things up. Leave such rows out; if it says nothing about "
                "the answer, name it under columns.ignored"
            )


def without_nulls(value: Any) -> Any:
    """``value`` without keys that are null, at every depth; an item of a list that is null stays."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def flagged(row: RawRow, name: str, turns: Sequence[Message]) -> list[bool | None]:
    """For each turn, whether it says that it carries loss (``train``, or ``weight`` 1 or 0); None says nothing.

    Raises: DataError for another value, or a turn with loss that is not the assistant's.
    """
    found: list[bool | None] = []
    for turn in turns:
        said = {key: turn[key] for key in LOSS_FLAGS if key in turn}
        odd = next((key for key, value in said.items() if value not in (0, 1)), None)
        if odd is not None:
            raise DataError(
                f"{row.where}: column {name!r}: a message has {odd} = {said[odd]!r}: a turn carries loss "
                "(1, true) or none (0, false); nothing in between is supported"
            )
        values = {bool(value) for value in said.values()}
        if len(values) == 2 or (True in values and turn["role"] != "assistant"):
            raise DataError(
                f"{row.where}: column {name!r}: a message of the {turn['role']} has {said}: only a turn of the "
                "assistant can carry loss, and its flags must agree. Leave them out of the others"
            )
        found.append(values.pop() if values else None)
    return found


LOSS_FLAGS = ("weight", "train")


def unflagged(turns: Sequence[Message]) -> list[Message]:
    """The turns without what `flagged` reads, which is no part of what is said."""
    return [{k: v for k, v in turn.items() if k not in LOSS_FLAGS} for turn in turns]


_CONVERT: dict[str, Callable[[RawRow, str, dict[str, Any]], Message]] = {
    "chat": _chat_message,
    "sharegpt": _sharegpt_message,
}


def is_transcript(text: str) -> bool:
    return _TURN.match(text.lstrip()) is not None


def _transcript(text: str) -> list[Message]:
    """Turns of a "Human: … Assistant: …" transcript, stripped, in order."""
    parts = _TURN.split(text.strip())[1:]
    return [
        turn(ROLES["human"] if speaker == "Human" else "assistant", words.strip())
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def kind_of(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"{type(value).__name__} {shown(value)}"
