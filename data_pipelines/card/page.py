"""A card as one HTML file: no script, no request, readable in light and dark, at a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipelines.card.bars import bars
from data_pipelines.card.findings import SEVERITY, Card, Check, Section, Verdict
from eval.comparison.markup import Markup, el, joined, table
from eval.comparison.page_style import STYLE

# Nothing may be fetched or run, whatever a response holds: escaping is the first wall, this is the second.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
svg .fill{fill:var(--c)}
.verdict{display:inline-block;min-width:3.2rem;text-align:center;border-radius:4px;padding:0 .4em;font-weight:600;
font-size:.875rem;border:1px solid currentColor}
.verdict.ok{color:var(--good)}.verdict.stop{color:var(--bad)}.verdict.none{color:var(--quiet)}
.verdict.look{background:var(--warn);color:var(--warn-ink)}
ul.checks{list-style:none;padding:0}
ul.checks li{display:grid;grid-template-columns:4.2rem 1fr;gap:.1rem .75rem;padding:.5rem 0;
border-bottom:1px solid var(--rule)}
ul.checks p{margin:0}
"""
_WORDS: dict[Verdict, str] = {
    "ok": "ok",
    "look": "look",
    "stop": "stop",
    "none": "no data",
}


def page(card: Card) -> str:
    """The page's HTML."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", f"Card: {card.title}"),
        el("style", Markup(STYLE + _STYLE)),
    )
    sections = [_section(section) for section in card.sections]
    main = el("main", _header(card), *sections)
    return f"<!doctype html>\n{el('html', head, el('body', main), lang='en')}\n"


def _header(card: Card) -> Markup:
    """The verdict, then what needs attention, gravest first, then where to find the rest."""
    urgent = [
        check
        for check in sorted(card.checks, key=lambda each: -SEVERITY[each.verdict])
        if check.verdict in ("look", "stop")
    ]
    counts: dict[Verdict, int] = {
        each: sum(c.verdict == each for c in card.checks) for each in _WORDS
    }
    shown = ", ".join(f"{n} {_WORDS[each]}" for each, n in counts.items() if n)
    links = (
        joined([el("a", section.title, href=f"#{_anchor(section)}"), " "])
        for section in card.sections
    )
    return el(
        "header",
        el("h1", card.title, " ", verdict_mark(card.worst())),
        el("p", f"{len(card.checks)} checks: {shown}.", class_="quiet"),
        _checks(urgent) if urgent else el("p", "Nothing to look at."),
        el("nav", *links),
    )


def _section(section: Section) -> Markup:
    figures = [bars(each) for each in section.histograms]
    parts = [
        el("h2", section.title, id=_anchor(section)),
        el("p", section.note, class_="quiet") if section.note else "",
        _checks(section.checks),
        el("div", *figures, class_="two") if len(figures) > 1 else joined(figures),
    ]
    for each in section.tables:
        texts = max(1, len(each.headers) - _num_number_columns(each.rows))
        parts += [el("h3", each.title), table(each.headers, each.rows, texts=texts)]
    return el("section", *parts)


def _checks(checks: Iterable[Check]) -> Markup:
    return el("ul", *map(_check, checks), class_="checks")


def _check(check: Check) -> Markup:
    small = [el("small", check.threshold)] if check.threshold else []
    advice = [el("p", f"→ {check.advice}")] if check.advice else []
    words = el("div", el("p", el("b", check.name), f": {check.value} ", *small), *advice)
    return el("li", el("div", verdict_mark(check.verdict)), words)


def verdict_mark(verdict: Verdict) -> Markup:
    """The verdict as a badge: colour and word, for who cannot tell the colours."""
    return el("span", _WORDS[verdict], class_=f"verdict {verdict}")


def _anchor(section: Section) -> str:
    return "".join(c if c.isalnum() else "-" for c in section.name)


def _num_number_columns(rows: Sequence[Sequence[str]]) -> int:
    """How many of the last columns hold numbers alone: they stand to the right."""
    count = 0
    for column in zip(*(row[::-1] for row in rows), strict=True):
        if not all(cell[:1] in "+-−0123456789" for cell in column):
            break
        count += 1
    return count
