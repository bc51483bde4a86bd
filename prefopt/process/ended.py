"""How a run ended, as a file: `accelerate launch` ends with 1, whatever its processes end with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from prefopt.process.progress import progress
from prefopt.process.stopping import Stopped, name_of
from prefopt.storage.cache import atomic_write

FILE = "ended.json"


@contextlib.contextmanager
def ended(run_dir: Path) -> Iterator[None]:
    """Leaves ``ended.json`` of a run that finishes, or that a signal stopped in order; a queue may start it again.

    ``code`` is the exit code of its processes. There is none of a run that failed, was killed, or still runs.
    """
    writes = os.environ.get("RANK", "0") == "0"
    file = run_dir / FILE
    try:
        yield
    except Stopped as stopped:
        if writes and run_dir.is_dir():
            _write(file, stopped.code, name_of(stopped.number))
        raise
    if writes:
        _write(file, 0, None)


def begins(run_dir: Path) -> None:
    """From here on, what an earlier start has left says nothing. On the main process."""
    with contextlib.suppress(OSError):
        (run_dir / FILE).unlink()


def _write(file: Path, code: int, signal: str | None) -> None:
    record = {"code": code, "signal": signal, "stands": progress.stands}
    with contextlib.suppress(OSError), atomic_write(file) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
