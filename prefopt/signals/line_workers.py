"""Helper processes that answer JSON lines under a deadline, for libraries that hang or need a main thread.

Started as commands and not forked: the parent holds threads and a model, and a fork would copy both.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefopt.errors import SignalError


class WorkerTimeout(Exception):
    """A worker did not answer in time, and was killed."""


class WorkerDied(Exception):
    """A worker ended without an answer: out of memory, or crashed."""


class LineWorker:
    """One process of ``python -m module``: a JSON line in, a JSON line out. One thread at a time."""

    def __init__(self, module: str, startup_timeout_s: float = 120.0) -> None:
        self.module = module
        self.startup_timeout_s = startup_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, message: Any, timeout_s: float) -> Any:
        """The worker's answer.

        Raises: WorkerTimeout or WorkerDied; the next call starts a new process. SignalError if it cannot
            be started.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            return self._line(process, timeout_s)
        except BrokenPipeError:
            self.close()
            raise WorkerDied from None
        except BaseException:  # a late answer must never be taken for the next one's
            self.close()
            raise

    def close(self) -> None:
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # -P: the directory of the run must not shadow a module
        command = [sys.executable, "-P", "-m", self.module]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            ready = self._line(self._process, self.startup_timeout_s)
        except (WorkerTimeout, WorkerDied) as error:
            self.close()
            raise SignalError(
                f"the helper process `python -m {self.module}` did not start within "
                f"{self.startup_timeout_s:g} s; run that command to see why"
            ) from error
        if ready != "ready":
            self.close()
            raise SignalError(f"the helper process `python -m {self.module}`: {ready}")
        return self._process

    def _line(self, process: subprocess.Popen[bytes], timeout_s: float) -> Any:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        end = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not readable:
                raise WorkerTimeout
            chunk = os.read(descriptor, 65536)
            if not chunk:
                raise WorkerDied
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


class LineWorkers:
    """``num_workers`` processes of one module that share a list of messages; started when first asked."""

    def __init__(self, module: str, num_workers: int) -> None:
        self._workers = [LineWorker(module) for _ in range(num_workers)]
        self._lock = threading.Lock()

    def ask_all(self, messages: Sequence[Any], timeout_s: float) -> list[Any]:
        """The answer to each message, in order; a WorkerTimeout or WorkerDied instance where there is none.

        Raises: SignalError if a process cannot be started.
        """
        with self._lock:
            idle: queue.SimpleQueue[LineWorker] = queue.SimpleQueue()
            for worker in self._workers:
                idle.put(worker)

            def ask(message: Any) -> Any:
                worker = idle.get()
                try:
                    return worker.ask(message, timeout_s)
                except (WorkerTimeout, WorkerDied) as error:
                    return error
                finally:
                    idle.put(worker)

            with ThreadPoolExecutor(len(self._workers)) as threads:
                return list(threads.map(ask, messages))

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        with self._lock:
            for worker in self._workers:
                worker.close()
