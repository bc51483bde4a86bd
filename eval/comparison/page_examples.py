"""The examples on which two models differ most, side by side; every text is escaped, long ones are folded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.comparison.markup import Markup, el
from eval.comparison.tree import Contrast, Pair, win_words
from eval.comparison.wording import number

_OPEN_CHARACTERS = 400
_MOST_CHARACTERS = 20_000


def examples(pair: Pair, direction: str) -> list[Markup]:
    """Both lists of a pair, folded; nothing for a pair without any."""
    won, lost = win_words(direction)
    return [
        _list(
            f"{word} of {pair.second} over {pair.first}" if direction != "none" else word,
            tone,
            pair,
            each,
        )
        for word, tone, each in ((won, "gain", pair.wins), (lost, "loss", pair.losses))
        if each
    ]


def _list(what: str, tone: str, pair: Pair, contrasts: Sequence[Contrast]) -> Markup:
    items = [_example(contrast, pair, tone) for contrast in contrasts]
    return el("details", el("summary", f"The {len(items)} largest {what}"), *items)


def _example(contrast: Contrast, pair: Pair, tone: str) -> Markup:
    change = el("b", number(contrast.difference, signed=True), class_=tone)
    sides = ((pair.first, contrast.first), (pair.second, contrast.second))
    columns = []
    for name, side in sides:
        facts = dict(side.values) | ({"problem": side.problem} if side.problem else {})
        columns.append(
            el(
                "div",
                el("h3", name),
                _text(side.answer) if side.answer else el("p", "no text", class_="quiet"),
                _facts(facts),
                _facts(side.details),
            )
        )
    return el(
        "article",
        el("p", change, " ", el("small", contrast.key)),
        _text(contrast.first.prompt),
        el("div", *columns, class_="sides"),
        class_="example",
    )


def _facts(facts: Mapping[str, Any]) -> Markup:
    """``name: value`` pairs; verdicts and judges' words are among the details."""
    written = [
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in facts.items()
    ]
    return _text("\n".join(written), "text quiet") if written else Markup()


def _text(text: str, class_: str = "text") -> Markup:
    if len(text) <= _OPEN_CHARACTERS:
        return el("div", text, class_=class_)
    cut = len(text) - _MOST_CHARACTERS
    shown = text if cut <= 0 else f"{text[:_MOST_CHARACTERS]}\n… {cut:,} more characters"
    start = " ".join(text[:_OPEN_CHARACTERS].split())
    head = el("summary", f"{start[:160]}… ({len(text):,} characters)")
    return el("details", head, el("div", shown, class_=class_))
