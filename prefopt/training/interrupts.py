"""Signals while training: a request to save and stop, agreed by all processes."""

from __future__ import annotations

import contextlib
import time

from accelerate import Accelerator

from prefopt.model.distributed import marked_on_all_ranks, max_over_processes
from prefopt.process.stopping import Stopped, stopping

# A launcher gives some 30 s. Ranks are never held up for each other more often than this between two forwards:
# micro-batches differ in length, and a collective after each would make all wait for the longest.
_EVERY_S = 5.0
_MOST_SKIPPED = 16
"""Forwards may become slower without notice."""


class Interrupts:
    """Inside it a signal (`prefopt.process.stopping`) waits until the processes agree on it.

    Says so at once, since a forward may take a while. A second one stops without saving.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._stack = contextlib.ExitStack()
        self._calls = self._skipped = 0
        self._asked_at = time.monotonic()

    def __enter__(self) -> Interrupts:
        self._stack.enter_context(stopping.handled())  # where no command has: `prefopt.train`
        self._stack.enter_context(stopping.deferred())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raises Stopped on every process if any was asked to stop. A collective where there are several."""
        (number,) = max_over_processes(self.accelerator, float(stopping.number or 0))
        self._raise(int(number))

    def check_between_forwards(self) -> None:
        """As `check`, but several processes ask each other only every few seconds.

        Each must call it as often as the others. After how many calls they ask again is computed from what the
        slowest one took for the last ones, so that all find the same number.
        """
        self._calls += 1
        if self.accelerator.num_processes > 1 and self._calls <= self._skipped:
            return
        seconds = (time.monotonic() - self._asked_at) / self._calls
        number, slowest = max_over_processes(self.accelerator, float(stopping.number or 0), seconds)
        self._skipped = min(_MOST_SKIPPED, int(_EVERY_S / max(slowest, 1e-3)))
        self._calls, self._asked_at = 0, time.monotonic()
        self._raise(int(number))

    def _raise(self, number: int) -> None:
        if number:
            raise marked_on_all_ranks(Stopped(number))
