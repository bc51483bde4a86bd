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
from typing import Any, Literal, TypeAlias

from prefopt.errors import SignalError

Verdict = Literal["passed", "failed", "timeout", "output"]
Reading: TypeAlias = tuple[tuple[str, bool], ...]
"""One way to read a response: sources in order, each with whether it is said to be Python."""
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
class Program:
    """What is run, and what it learns only once it ran."""

    readings: tuple[Reading, ...]
    """Of what the model wrote, the likeliest first (`prefopt.signals.markdown_code.readings`)."""
    before: str = ""
    """Source put before it."""
    entry_point: str | None = None
    """A function that ``before`` begins: code that does not define it is taken for its body."""
    module: str = "__main__"
    """Its ``__name__``."""
    tests: str | None = None
    """Source that is run after it, in the same module."""
    imports: tuple[str, ...] = ()
    """Modules that the tests use: loaded before the program, and as they were when the tests begin."""
    stdin: str | None = None
    """Makes it a program that reads this and prints; it may leave by ``sys.exit()``."""
    call: str | None = None
    """A function, or a method of its class ``Solution``, that is called once it ran."""
    arguments: tuple[Any, ...] = ()
    """Of the call, as JSON."""

    def order(self) -> dict[str, Any]:
        """What the process is told at once."""
        return {
            "readings": self.readings,
            "before": self.before,
            "entry_point": self.entry_point,
            "module": self.module,
            "imports": self.imports,
            "script": self.stdin is not None,
            "call": self.call,
        }

    def later(self) -> dict[str, Any]:
        """What it is told once the program ran."""
        if self.call is not None:
            return {"arguments": self.arguments}
        return {"tests": self.tests}


def source_program(source: str) -> Program:
    """A program that is one source as it is."""
    return Program((((source, True),),))


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """``passed``: it ran to its end. ``failed``: it raised, left early, or was killed by a limit."""
    output: str
    """What it printed, cut to ``output_bytes``; of a program with ``stdin`` without standard error."""
    value: Any = None
    """What the call gave, as JSON has it."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def run_program(program: str | Program, limits: Limits) -> Outcome:
    """Runs Python to its end, or to one of its limits. Safe to call from several threads.

    Args:
        program: a source as it is, or what a model wrote and what comes before and after it.
        limits: of the whole run, tests included.

    Raises: SignalError if a process cannot be started or isolated here.
    """
    if isinstance(program, str):
        program = source_program(program)
    with _process(program.stdin) as running:
        token = secrets.token_bytes(16)
        running.say(
            {
                **program.order(),
                "cpu_s": math.ceil(limits.cpu_s),
                "memory_bytes": limits.memory_bytes,
                "file_bytes": limits.file_bytes,
            }
        )
        verdict = running.watch(
            limits, _message(json.dumps(program.later()).encode()) + _message(token)
        )
    first, _, rest = running.result.partition(b"\n")
    if first != b"ready":
        reason = (first or running.output).decode(errors="replace").strip()
        raise SignalError(f"python_tests cannot run model-written code safely here: {reason}")
    if running.returncode == -signal.SIGXCPU:
        verdict = "timeout"
    value = None
    if verdict is None and program.stdin is not None:
        verdict = "passed" if running.returncode == 0 else "failed"
    elif verdict is None:
        told = rest.removeprefix(b"loaded\n").removesuffix(token)
        passed = rest == b"loaded\n" + told + token
        if passed and program.call is not None:
            value, passed = _value(told)
        elif told:
            passed = False
        verdict = "passed" if passed else "failed"
    output = running.output[: limits.output_bytes].decode(errors="replace")
    return Outcome(verdict, output, value)


def _value(told: bytes) -> tuple[Any, bool]:
    try:
        return json.loads(told), True
    except (ValueError, RecursionError):  # a program may have written anything
        return None, False


def _message(content: bytes) -> bytes:
    return len(content).to_bytes(8, "big") + content


class _Running:
    """One process, what it is to be told and what it said."""

    def __init__(self, process: subprocess.Popen[bytes], orders_fd: int, result_fd: int) -> None:
        self.process = process
        self.orders_fd = orders_fd
        self.result_fd = result_fd
        self.waiting = b""
        self.output = b""
        self.result = b""
        self.returncode: int | None = None

    def say(self, orders: dict[str, Any]) -> None:
        self.waiting += _message(json.dumps(orders).encode())

    def watch(self, limits: Limits, later: bytes) -> Verdict | None:
        """None once the program ended; or that it took too long or said too much.

        ``later`` is sent when the program says that it ran.
        """
        assert self.process.stdout is not None
        stdout = self.process.stdout.fileno()
        # The clock of the program starts when it does, not while a busy machine starts its interpreter.
        end, started, told = time.monotonic() + _STARTUP_TIMEOUT_S, False, False
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(self.result_fd, selectors.EVENT_READ)
            selector.register(self.orders_fd, selectors.EVENT_WRITE)
            open_ends = {stdout, self.result_fd}
            while open_ends:
                for key, _ in selector.select(max(0.0, end - time.monotonic())):
                    if key.fd == self.orders_fd:
                        if not self._send():
                            selector.unregister(self.orders_fd)
                    elif not self._receive(key.fd):
                        selector.unregister(key.fd)
                        open_ends.discard(key.fd)
                if not started and b"\n" in self.result:
                    started, end = True, time.monotonic() + limits.wall_s
                if not told and self.result.startswith(b"ready\nloaded\n"):
                    told = True
                    self.waiting += later
                    if self.orders_fd not in selector.get_map():
                        selector.register(self.orders_fd, selectors.EVENT_WRITE)
                if time.monotonic() >= end:
                    return "timeout"
                if max(len(self.output), len(self.result)) > limits.output_bytes:
                    return "output"
        return None

    def _send(self) -> bool:
        """Writes what fits into the pipe; False when nothing waits, or nobody reads any more."""
        try:
            self.waiting = self.waiting[os.write(self.orders_fd, self.waiting[:65536]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self.waiting = b""
        return bool(self.waiting)

    def _receive(self, descriptor: int) -> bool:
        chunk = os.read(descriptor, 65536)
        if descriptor == self.result_fd:
            self.result += chunk
        else:
            self.output += chunk
        return bool(chunk)


@contextlib.contextmanager
def _process(stdin: str | None) -> Iterator[_Running]:
    """A process in a directory of its own; it is dead, and the directory gone, afterwards."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="prefopt-sandbox-", ignore_cleanup_errors=True)
        )
        orders_out, orders_in, result_out, result_in = (*os.pipe(), *os.pipe())
        for descriptor in (orders_in, result_out):
            stack.callback(os.close, descriptor)
        os.set_blocking(orders_in, False)
        try:
            process = _start(home, (orders_out, result_in), stdin)
        finally:
            os.close(orders_out)
            os.close(result_in)
        running = _Running(process, orders_in, result_out)
        try:
            yield running
        finally:
            _kill(process)
            running.returncode = process.returncode


def _start(home: str, descriptors: tuple[int, int], stdin: str | None) -> subprocess.Popen[bytes]:
    # Cleared, not filtered: keys of judges and trackers live in the environment. One thread: each thread
    # of a BLAS takes address space.
    environment = {"HOME": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as given:  # a file, not a pipe: programs ask for its size
        given.write((stdin or "").encode(errors="surrogatepass"))
        given.seek(0)
        return subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", str(_CHILD), *map(str, descriptors)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if stdin is None else subprocess.DEVNULL,
            cwd=home,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
