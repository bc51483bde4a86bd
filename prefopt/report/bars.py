"""How far long work is: a bar at a terminal, a line every half minute elsewhere, and what a silent wait is for."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from prefopt.shown import shown

logger = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""In a log file a bar is thousands of carriage returns; a queue's log is read by lines."""

_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """tqdm's bar where someone watches; where nobody does, lines of text, the last one at the end.

    Takes what tqdm takes. Short work that leaves nothing behind (``leave=False``) then writes no line.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._is_watched = is_watched()
        options = {name: _shown(option) for name, option in options.items()}
        if not self._is_watched:
            options |= {"mininterval": LINE_EVERY_S, "maxinterval": 2 * LINE_EVERY_S}
            options |= {"bar_format": _LINE, "dynamic_ncols": False}
            options["file"] = _Lines()
            if not options.get("leave", True):
                options["delay"] = LINE_EVERY_S
        super().__init__(*map(_shown, args), **options)

    def set_postfix(self, *args: Any, refresh: bool = True, **values: Any) -> None:
        """As tqdm's; where nobody watches, it is shown with the next line."""
        super().set_postfix(*args, refresh=refresh and self._is_watched, **values)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self._is_watched:
            return bool(super().display(msg, pos))
        self.fp.write(str(self) if msg is None else msg)
        return True


def _shown(option: Any) -> Any:
    return shown(option) if isinstance(option, str) else option


class _Lines(io.TextIOBase):
    """Every text a line of its own; what tqdm writes to clear and end a bar is none."""

    def write(self, text: str) -> int:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")
            sys.stderr.flush()
        return len(text)


def is_watched() -> bool:
    """Is stderr a terminal, or a notebook that draws bars as one does?"""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def waiting(
    what: str, *, detail: Callable[[], str] = str, every_s: float = LINE_EVERY_S
) -> Iterator[None]:
    """Says what is waited for, at once and every ``every_s`` with the time so far.

    For work that says nothing itself: a server that starts, a compiler.

    Args:
        what: one line.
        detail: what there is to add each time.
    """
    started, over = time.monotonic(), threading.Event()

    def remind() -> None:
        while not over.wait(every_s):
            seconds = time.monotonic() - started
            logger.info("%s: still waiting, %.0f s%s", what, seconds, detail())

    logger.info("%s", what)
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()
    seconds = time.monotonic() - started
    if seconds >= every_s:
        logger.info("%s: done after %.0f s", what, seconds)
