"""Runs model-written Python in a process that can hurt nobody: what holds, and what does not.

Guaranteed on Linux (x86_64, arm64), with or without privileges, tried in the child before each program:

- wall time, CPU time, address space, size of a file, number of open files, amount of output;
- no network: ``socket()`` is denied by a seccomp filter (and the network namespace is empty where the
  kernel permits one), so it holds against ``ctypes`` too;
- no new process, so no fork bomb and nothing that outlives the kill;
- no signal, ptrace or limit set on any other process, the parent included;
- an empty environment (no keys), a working directory of its own that is removed afterwards.

Where the kernel has Landlock (5.13 and later), files outside that directory cannot be changed; elsewhere
their permissions protect them. Not prevented: reading files that the user may read (with nowhere to send
them), filling the disk with many small files within the time limit, kernel exploits, and a response that
attacks its own test harness from inside: a reward hack, not an escape. For hostile code use a container.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefopt.errors import SignalError

Verdict = Literal["passed", "failed", "timeout", "output"]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_STARTUP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own (some 30 MB) and every thread's stack included."""
    file_bytes: int = 1 << 20
    """Largest file it may write."""
    output_bytes: int = 1 << 16
    """Most it may print, standard error included."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """``passed``: it ran to its end. ``failed``: it raised, left early, or was killed by a limit."""
    output: str
    """What it printed, cut to ``output_bytes``."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def run_program(program: str, limits: Limits) -> Outcome:
    """Runs Python source to its end, or to one of its limits. Safe to call from several threads.

    Raises: SignalError if a process cannot be started or isolated here.
    """
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="prefopt-sandbox-", ignore_cleanup_errors=True) as home,
        _result_pipe() as (read_fd, write_fd),
    ):
        orders = {
            "program": program,
            "token": token,
            "result_fd": write_fd,
            "cpu_s": math.ceil(limits.cpu_s),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
        }
        process = _start(home, write_fd)
        os.close(write_fd)
        try:
            verdict, output, result = _watch(process, json.dumps(orders), read_fd, limits)
        finally:
            _kill(process)
    first, _, rest = result.partition(b"\n")
    if first != b"ready":
        reason = (first or output).decode(errors="replace").strip()
        raise SignalError(f"python_tests cannot run model-written code safely here: {reason}")
    if process.returncode == -signal.SIGXCPU:
        verdict = "timeout"
    if verdict is None:
        verdict = "passed" if rest == token.encode() else "failed"
    return Outcome(verdict, output.decode(errors="replace"))


@contextlib.contextmanager
def _result_pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe; the reader is closed at the end, the writer by whoever gave it away."""
    read_fd, write_fd = os.pipe()
    try:
        yield read_fd, write_fd
    finally:
        os.close(read_fd)


def _start(home: str, result_fd: int) -> subprocess.Popen[bytes]:
    # Cleared, not filtered: keys of judges and trackers live in the environment. One thread: each thread
    # of a BLAS takes address space.
    environment = {"HOME": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=home,
        env=environment,
        pass_fds=(result_fd,),
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen[bytes], orders: str, result_fd: int, limits: Limits
) -> tuple[Verdict | None, bytes, bytes]:
    """``(verdict, output, result)`` once the program ended (verdict None), took too long or said too much."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(orders.encode())
    received = {process.stdout.fileno(): b"", result_fd: b""}
    # The clock of the program starts when it does, not while a busy machine starts its interpreter.
    end, started = time.monotonic() + _STARTUP_TIMEOUT_S, False
    verdict: Verdict | None = None
    with selectors.DefaultSelector() as selector:
        for descriptor in received:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and verdict is None:
            events = selector.select(max(0.0, end - time.monotonic()))
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                received[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
            if not started and b"\n" in received[result_fd]:
                started, end = True, time.monotonic() + limits.wall_s
            if time.monotonic() >= end:
                verdict = "timeout"
            elif len(received[process.stdout.fileno()]) > limits.output_bytes:
                verdict = "output"
    output = received[process.stdout.fileno()][: limits.output_bytes]
    return verdict, output, received[result_fd][:1024]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
