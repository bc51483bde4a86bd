"""Worker processes of one machine. They end with the driver, and one that dies is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait

from data_pipelines.base import StageSettings
from data_pipelines.executors import LocalExecutor, Retries
from data_pipelines.shard_work import Job, Made, Order, ShardWorker, ordered_settings
from prefopt.engines.child import describe_exit

# A fresh interpreter each: a fork would copy the threads and models of whoever calls `build`.
_SPAWN = multiprocessing.get_context("spawn")
_POLL_S = 0.5
"""How often a silent worker is looked at: what it has started may hold its pipe open after its death."""
_CLOSE_S = 60.0


class LocalWorkers:
    """As many processes as the settings say, each with one shard at a time."""

    def __init__(self, section: LocalExecutor) -> None:
        self.section = section

    def make(
        self, order: Order, settings: StageSettings, jobs: Sequence[Job]
    ) -> Generator[Made, None, None]:
        del settings  # each process makes its own
        retries = Retries(order.place.id, self.section.max_retries)
        waiting = deque(jobs)
        team = [_Process(order) for _ in range(min(self.section.workers, len(jobs)))]
        try:
            while waiting or any(each.job for each in team):
                for each in team:
                    if each.job is None and waiting:
                        each.give(waiting.popleft())
                wait([each.pipe for each in team if each.job], _POLL_S)
                for place, each in enumerate(team):
                    if each.job is None:
                        continue
                    made = each.answer()
                    if made is not None:
                        yield made
                    elif (died := each.died()) is not None:
                        retries.died(each.job, died)
                        waiting.appendleft(each.job)
                        each.kill()
                        team[place] = _Process(order)
            for each in team:
                each.finish()
        finally:
            for each in team:
                each.kill()

    def close(self) -> None:
        """Nothing to leave: workers end with their stage."""


class _Process:
    """One worker process, and the shard it is at."""

    def __init__(self, order: Order) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, order))
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # dead already: `died` says so
            self.pipe.send(job)

    def answer(self) -> Made | None:
        """The shard, if it is done. Raises: what its stage raised."""
        try:
            found = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            self.process.join(_POLL_S)
            return None
        if isinstance(found, BaseException):
            raise found
        if found is not None:
            self.job = None
        return found

    def died(self) -> str | None:
        """How the process ended, None while it lives."""
        code = self.process.exitcode
        return None if code is None else describe_exit(code)

    def finish(self) -> None:
        """Has the worker free what it holds."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(_CLOSE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, order: Order) -> None:
    """What a worker process does until it is told to stop, or the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    worker: ShardWorker | None = None
    while (job := pipe.recv()) is not None:
        try:
            worker = worker or ShardWorker(order, ordered_settings(order))
            pipe.send(worker.make(job))
        except Exception as error:  # whatever the stage raises is the driver's to raise
            error.add_note(traceback.format_exc())
            pipe.send(error)
    if worker is not None:
        worker.close()


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)
