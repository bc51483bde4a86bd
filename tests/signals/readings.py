"""Tables of what a verifier reads as what: each row is a test, and a line of docs/signals.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "signals.md"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; texts are code, with what does not show written out (``U+2009``)."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def require_in_page(name: str, text: str) -> None:
    """Fails with the table to paste where docs/signals.md has another below ``<!-- table: name -->``."""
    page = PAGE.read_text(encoding="utf-8")
    mark = f"<!-- table: {name} -->\n"
    assert mark in page, f"docs/signals.md: no {mark.strip()}"
    found = page.split(mark, 1)[1].split("\n\n", 1)[0]
    assert found == text, f"docs/signals.md, table {name}: put this in its place:\n{text}"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    text = str(value).replace("\n", "⏎").replace("|", "\\|")
    shown = "".join(each if each.isprintable() else f"⟨U+{ord(each):04X}⟩" for each in text)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`" if shown else "nothing"
