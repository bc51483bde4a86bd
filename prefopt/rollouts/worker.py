"""Runs jobs in order: at once, or on a thread of its own while the trainer trains."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from prefopt.errors import EngineError
from prefopt.process.stopping import stopping

Job = Callable[[], Any]


class Worker:
    """First in, first out. Once a job has raised, later ones raise the same: their order was the point.

    Args:
        threaded: run jobs on a thread; otherwise each runs inside `submit`.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._queue: queue.Queue[tuple[Job, Future[Any]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._loop, name="rollouts", daemon=True)
            self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """The job's future result."""
        future: Future[Any] = Future()
        if self._thread is None:
            self._run(job, future)
        else:
            self._queue.put((job, future))
        return future

    def close(self, timeout_s: float = 10.0) -> None:
        """Gives up what is waiting, and waits a little for the job that runs."""
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            job, future = item
            if self._closed:
                future.cancel()
            else:
                self._run(job, future)

    def _run(self, job: Job, future: Future[Any]) -> None:
        if self._error is not None:
            future.set_exception(self._error)
            return
        try:
            # In the caller's own thread a signal ends the job, and whoever waits for it is told.
            with stopping.interruptible() if self._thread is None else contextlib.nullcontext():
                result = job()
            future.set_result(result)
        except BaseException as error:
            self._error = error
            future.set_exception(error)


def wait(future: Future[Any], timeout_s: float, what: str) -> Any:
    """The result.

    Raises: whatever the job raised; EngineError naming ``what`` after ``timeout_s``; Stopped for a signal.
    """
    try:
        with stopping.interruptible():
            return future.result(timeout_s)
    except FutureTimeoutError as error:
        if future.done():  # the job itself ran into a timeout of its own
            raise
        raise EngineError(
            f"waited {timeout_s:g} s for {what}: raise engine.timeout_s if that is too short for this "
            "model, else look at the engine's log"
        ) from error
    except CancelledError as error:
        raise EngineError(f"{what}: given up, the run is closing") from error
