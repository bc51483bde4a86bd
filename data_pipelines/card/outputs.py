"""Where a card goes: JSON for programs, a page for people, a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipelines.card.findings import Card, Verdict
from data_pipelines.card.page import page
from data_pipelines.card.pairs import PairSource
from prefopt.errors import ConfigError, DataError
from prefopt.storage.cache import atomic_write

JSON_FILE, PAGE_FILE = "card.json", "card.html"
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
    text = json.dumps(card.record(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    for name, content in ((JSON_FILE, text), (PAGE_FILE, page(card))):
        path = folder / name
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}. Make room, or name another folder with "
                "--output"
            ) from error


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
        table.add_row(f"[{colour}]{check.verdict}[/{colour}]", _plain(check.name), _plain(words))
    console = Console()
    console.print(table)
    colour = _COLOURS[card.worst()]
    console.print(f"verdict: [{colour}]{card.worst()}[/{colour}]")


def _plain(text: str) -> str:
    """Text of the data, which may hold what rich takes for markup."""
    return text.replace("[", "\\[")


def _stem(path: str) -> str:
    """``pairs`` of ``data/pairs.jsonl.gz``; the whole name of a hub data set."""
    if "/" in path and not Path(path).exists() and not path.startswith((".", "/", "~")):
        return path
    name = Path(path).name
    return name.split(".")[0] or name
