"""Where a card goes: JSON for programs, a page for people, a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from data_pipelines.card.findings import SEVERITY, Card, TableView, Verdict
from data_pipelines.card.pairs import PairSource
from prefopt.errors import ConfigError
from prefopt.report.charts import histogram
from prefopt.report.pages import render, write_text
from prefopt.report.terminal import Terminal

JSON_FILE, PAGE_FILE = "card.json", "card.html"
_TEMPLATE = Path(__file__).with_name("card.html.j2")
_WORDS: dict[Verdict, str] = {"ok": "ok", "look": "look", "stop": "stop", "none": "no data"}
_COLOURS: dict[Verdict, str] = {"ok": "green", "look": "yellow", "stop": "bold red", "none": "dim"}


def default_folder(source: PairSource) -> Path:
    """``card/STAGE`` of a pipeline's folder; of other data, a name of its own in the current directory.

    Never beside a user's files: a glob or a folder that is a data source would read the card as data.
    Raises: ConfigError for a source without a name to call it by.
    """
    stage = source.stage_folder
    if stage is not None:
        return stage.parent / "card" / stage.name
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in _stem(source.path)).strip("-")
    if not name:
        raise ConfigError(f"{source.path!r}: where should its card go? Name a folder with --output")
    return Path("cards") / name


def write_card(card: Card, folder: Path) -> None:
    """Writes both files, each whole or not at all. Raises: DataError if one cannot be written."""
    text = json.dumps(card.record(), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(folder / JSON_FILE, f"{text}\n")
    write_text(folder / PAGE_FILE, page(card))


def page(card: Card) -> str:
    """The page's HTML: the verdict, what needs attention, gravest first, then section by section."""
    gravest = sorted(card.checks, key=lambda check: -SEVERITY[check.verdict])
    counts = {word: sum(c.verdict == each for c in card.checks) for each, word in _WORDS.items()}
    return render(
        _TEMPLATE,
        card=card,
        words=_WORDS,
        counts=", ".join(f"{count} {word}" for word, count in counts.items() if count),
        urgent=[check for check in gravest if check.verdict in ("look", "stop")],
        histogram=histogram,
        num_text_columns=_num_text_columns,
    )


def _num_text_columns(table: TableView) -> int:
    """All but the last columns that hold numbers alone: those stand to the right."""
    numbers = [
        all(row[index][:1] in "+-−0123456789" for row in table.rows)
        for index in range(len(table.headers))
    ]
    return max((index + 1 for index, each in enumerate(numbers) if not each), default=1)


def print_card(card: Card) -> None:
    """Every check as a line, and what to do about those that are not ok."""
    table = Table(title=card.title, show_lines=False)
    for name in ("", "check", "found"):
        table.add_column(name, overflow="fold")
    for check in card.checks:
        colour = _COLOURS[check.verdict]
        words = (
            f"{check.value}\n→ {check.advice}" if check.verdict in ("look", "stop") else check.value
        )
        table.add_row(Text(check.verdict, colour), check.name, words)
    console = Terminal()
    console.print(table)
    colour = _COLOURS[card.worst()]
    console.print(Text.assemble("verdict: ", (card.worst(), colour)))


def _stem(path: str) -> str:
    """``pairs`` of ``data/pairs.jsonl.gz``; the whole name of a hub data set."""
    if "/" in path and not Path(path).exists() and not path.startswith((".", "/", "~")):
        return path
    name = Path(path).name
    return name.split(".")[0] or name
