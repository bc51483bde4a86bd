"""Watching processes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

HANG_S = 300.0
"""What only a process that stays takes, however busy the machine is."""


def wait_until(condition: Callable[[], bool], timeout_s: float = HANG_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def descendants() -> list[psutil.Process]:
    """Every process below this one."""
    return psutil.Process().children(recursive=True)
