"""Signals that ask a process to end, from its first moment to its last.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 mean the same: end soon, and keep what can be kept. The exit code is 128 + the
signal's number, as a shell has it. Where there is nothing to keep, the handler raises `Stopped`; inside `deferred`
(training) it leaves a note, which the loop looks for. A second signal raises in any case. The main thread may sit
in C code, where no handler runs: a thread of ours hears of the signal all the same, and ends the process when the
main thread has not come back in time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from prefopt.process.ending import end_process
from prefopt.process.progress import progress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_S = 0.5
# Closing an engine takes some ten seconds; a launcher kills after 30 (torchrun).
_UNWIND_S = 20.0
_AT_ONCE_S = 3.0
# A queue signals the launcher and its processes, and the launcher passes on what it got: one request, heard twice.
_SAME_REQUEST_S = 3.0


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__(f"stopped by {name_of(number)}")
        self.number = number
        self.at_once = at_once
        """It was asked twice: nothing is saved any more."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.number,)

    @property
    def code(self) -> int:
        """The exit code of a process that ends for it."""
        return 128 + self.number


def name_of(number: int) -> str:
    """``SIGTERM`` of 15."""
    return signal.Signals(number).name


def launcher_variables() -> bool:
    """Was this process started by accelerate's or torch's launcher?"""
    return any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)


class _Arrivals:
    """Requests so far; a launcher's repetition of one is none."""

    def __init__(self, same_request_s: float) -> None:
        self.count = 0
        self.last = 0
        self._same_request_s = same_request_s
        self._first_at = 0.0

    def add(self, number: int) -> bool:
        """False if it only repeats what was asked already."""
        now = time.monotonic()
        if self.count == 1 and now - self._first_at < self._same_request_s:
            return False
        if not self.count:
            self._first_at = now
        self.count += 1
        self.last = number
        return True


class Stopping:
    """The signal handling of this process; `stopping` is the one there is."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that asked for the end, None while none has."""
        self._active = False
        self._deferred = 0
        self._interruptible = 0
        self._previous: dict[int, Any] = {}
        self._handled = self._heard = _Arrivals(0.0)
        os.register_at_fork(after_in_child=self._forget)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """From here on signals raise `Stopped`, and are this process's exit code. Within itself it does nothing.

        SIGHUP that is ignored (nohup) stays ignored. Outside the main thread nothing can be handled.
        """
        if self._active or threading.current_thread() is not threading.main_thread():
            yield
            return
        same_request_s = _SAME_REQUEST_S if launcher_variables() else 0.0
        self.number, self._active = None, True
        self._handled, self._heard = _Arrivals(same_request_s), _Arrivals(same_request_s)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
        listener.start()
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
            signal.set_wakeup_fd(wakeup)
            self._active = False
            os.close(writing)  # ends the listener
            listener.join()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """What runs inside looks at `number` itself, and saves before it ends."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    @property
    def is_deferred(self) -> bool:
        """Does a signal wait for whoever looks at `number`?"""
        return self._deferred > 0

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside `deferred`: what may be given up at any point, because nothing has come of it yet.

        Raises: Stopped, also for a signal that came before.
        """
        self._interruptible += 1
        try:
            if self.number is not None:
                raise Stopped(self.number)
            yield
        finally:
            self._interruptible -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._handled.add(number):
            return
        if self._handled.count > 1:
            raise Stopped(number, at_once=True)
        self.number = number
        if self._deferred:
            self._say(number)
        if not self._deferred or self._interruptible:
            raise Stopped(number)

    def _say(self, number: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            again = "Ctrl-C again" if number == signal.SIGINT else "a second one"
            text = f"saving and stopping after this step; {again} stops at once, without saving"
            # Not logging: the signal may have interrupted a write to the stream, which is not re-entrant.
            os.write(2, f"\n{name_of(number)}: {text}\n".encode())

    def _listen(self, reading: int) -> None:
        """Ends the process where the main thread does not; and asks it to end when its launcher is gone."""
        launcher = os.getppid() if launcher_variables() else None
        deadline: float | None = None
        while True:
            readable, _, _ = select.select([reading], [], [], _POLL_S)
            if readable:
                data = os.read(reading, 64)
                if not data:
                    os.close(reading)
                    return
                for number in data:
                    if number in self._previous and self._heard.add(number):
                        deadline = None
            if launcher is not None and os.getppid() != launcher:
                os.write(2, f"\nthe launcher (process {launcher}) is gone\n".encode())
                launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if self._heard.count == 1 and self._deferred:
                deadline = None  # it saves, however long that takes
            elif self._heard.count and deadline is None:
                patience = _UNWIND_S if self._heard.count == 1 else _AT_ONCE_S
                deadline = time.monotonic() + patience
            if deadline is not None and time.monotonic() > deadline:
                end_process(128 + self._heard.last, said_of(self._heard.last))

    def _forget(self) -> None:
        """In a forked child: signals are for the child, and not this process's pipe."""
        if self._active:
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
            self._active = False
            self._deferred = self._interruptible = 0


def said_of(number: int) -> str:
    """What a process that a signal ends has to say: where it was, what stands."""
    stands = f": {progress.stands}" if progress.stands else ""
    return f"stopped by {name_of(number)} while {progress}{stands}"


stopping = Stopping()
"""Of this process: signals know no other owner."""
