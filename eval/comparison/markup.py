"""HTML and SVG elements as text that is escaped unless it was made here: an answer can hold any markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"meta", "br", "hr"}
# What no HTML document may hold: control characters, and halves of surrogate pairs, which are not UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already. Only `el` and `joined` make it."""

    __slots__ = ()


def el(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """``<name attributes>children</name>``; plain text among the children is escaped, `Markup` is not.

    Args:
        attributes: ``class_`` is class, other underscores are hyphens; None and False leave one out, True
            writes its name alone.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """The parts one after the other, plain text escaped."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in parts))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> Markup:
    """A table that scrolls sideways where it is wider than the page; all but the first ``texts`` columns right."""

    def cells(tag: str, row: Sequence[str]) -> Markup:
        made = (
            el(tag, cell, class_=None if index < texts else "n") for index, cell in enumerate(row)
        )
        return el("tr", *made)

    body = [cells("td", row) for row in rows]
    head = el("thead", cells("th", headers))
    return el("div", el("table", head, el("tbody", *body)), class_="scroll", tabindex="0")


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{_escaped(text)}"'


def _escaped(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text), quote=True)
