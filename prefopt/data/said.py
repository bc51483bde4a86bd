"""What messages say, and whether a rendering holds it: templates drop thoughts, tool calls, system messages."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.options import Omits, RenderOptions
from prefopt.data.rows import Message

SPOKEN = ("content", "reasoning_content", "reasoning", "thinking", "tool_plan", "refusal")
"""Keys of a message whose text is said; what else it carries (ids, times) need not be rendered."""
CALLS = ("tool_calls", "function_call")
_SHOWN = 60
"""Characters quoted of what is missing."""


def missing_from_prompt(
    messages: Sequence[Message], rendered: str, omits: Omits
) -> tuple[str, str] | None:
    """Who said something that ``rendered`` lacks (a role), and what; None if all is there.

    White space does not count: templates trim what they are given.
    """
    if omits == "anything":
        return None
    whole, said = _squeezed(rendered), Counter[str]()
    for message in messages:
        if omits == "history" and message["role"] == "assistant":
            continue
        for text in _texts(message):
            said[text] += 1
            if not _occurs(text, whole, said[text]):
                return message["role"], _short(text)
    return None


def missing_from_response(message: Message, prompt: str, whole: str) -> str | None:
    """What a response says that ``whole``, the rendering with it, does not hold once more than ``prompt``."""
    before, after = _squeezed(prompt), _squeezed(whole)
    for text in _texts(message):
        if not any(after.count(form) > before.count(form) for form in _forms(text)):
            return _short(text)
    return None


def not_taken(options: RenderOptions, reads: frozenset[str], rendered: str) -> str | None:
    """What is given to a chat template that takes no such thing, or leaves it out; None if all is taken."""
    if options.omits == "anything":
        return None
    for name in options.given:
        if name not in reads:
            return f"the chat template takes no {name}"
    whole = _squeezed(rendered)
    for tool in options.tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not _occurs(name, whole, 1):
            return f"the chat template leaves out the tool {name!r}"
    return None


def _texts(message: Message) -> Iterator[str]:
    for key in SPOKEN:
        if isinstance(message.get(key), str):
            yield from filter(str.strip, (message[key],))
    for key in CALLS:
        yield from filter(str.strip, _leaves(_calls(message.get(key))))


def _calls(value: Any) -> Iterator[Any]:
    """Name and arguments of every call; arguments that are JSON text are read."""
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, Mapping):
            continue
        function = call.get("function", call)
        if isinstance(function, Mapping):
            yield function.get("name")
            yield parsed_arguments(function.get("arguments"))


def parsed_arguments(value: Any) -> Any:
    """The arguments of a tool call, out of JSON text if they are an object there."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict) else value
    return value


def _leaves(values: Iterable[Any]) -> Iterator[str]:
    """Strings at any depth; numbers are written in too many ways to be looked for."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from map(str, value)
            yield from _leaves(value.values())
        elif isinstance(value, list | tuple):
            yield from _leaves(value)


def _occurs(text: str, squeezed: str, times: int) -> bool:
    return any(squeezed.count(form) >= times for form in _forms(text))


def _forms(text: str) -> Iterator[str]:
    """``text`` without white space, as it stands and as templates escape it in JSON (twice too) and XML."""
    yield _squeezed(text)
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    yield _squeezed(escaped)
    yield _squeezed(json.dumps(text)[1:-1])
    yield _squeezed(json.dumps(escaped, ensure_ascii=False)[1:-1])
    yield _squeezed(html.escape(text, quote=False))
    yield _squeezed(html.escape(text)).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
