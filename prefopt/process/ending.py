"""The end of a process whose main thread cannot be asked: it sits in a collective, or in a library's C code."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

before_end: list[Callable[[int, str], None]] = []
"""Called with the exit code and the reason before `end_process` ends this process: who else must know."""


def end_process(code: int, why: str) -> None:
    """Says why and ends this process at once, with the children that would not notice.

    Nothing is unwound: files that count are written beside their names, and engines watch their parent.
    """
    for tell in before_end:
        tell(code, why)
    # Not logging: the main thread may hold its locks.
    if why:
        os.write(2, f"\n{why}\n".encode())
    for child in multiprocessing.active_children():  # vLLM's own, which outlives its parent (0.32)
        child.kill()
    os._exit(code)
