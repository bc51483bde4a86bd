"""Signals while training: a request to save and stop, agreed by all processes."""

from __future__ import annotations

import contextlib

from accelerate import Accelerator

from prefopt.model.distributed import agreed_signal, marked_on_all_ranks
from prefopt.process.stopping import Stopped, stopping


class Interrupts:
    """Inside it a signal (`prefopt.process.stopping`) waits until the processes agree on it.

    Says so at once, since a forward may take a while. A second one stops without saving.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        self._stack.enter_context(stopping.handled())  # where no command has: `prefopt.train`
        self._stack.enter_context(stopping.deferred())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def requested(self) -> int | None:
        """The signal that asked any process to stop. A collective where there are several."""
        return agreed_signal(self.accelerator, stopping.number)

    def check(self) -> None:
        """Raises Stopped on every process if any was asked to stop. A collective where there are several."""
        if (number := self.requested()) is not None:
            raise marked_on_all_ranks(Stopped(number))
