"""`prefopt` commands, in this process, or in one of their own to be killed, interrupted or run out of disk.

The latter are forks of one that has torch and the rest imported (tests/fork_server.py). After the imports
everything is as in the installed `prefopt`: `prefopt.cli.main`, its exit code, its stderr, its signal handlers.
`forked` runs any function so; tests/distributed/launch.py runs scripts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from tests import fork_server

HANG_S = 600.0
"""What only a command that hangs takes, however busy the machine is."""


class Prefopt:
    """Runs commands in this process and keeps what they say."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """``(exit code, stderr)``; an exception that escapes fails the test, as a traceback would a user."""
        self._capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        said = self._capfd.readouterr().err
        assert "Traceback" not in said
        return code, said

    def refuses(self, *arguments: object, code: int = 2) -> str:
        """What a command says that ends with ``code``."""
        found, said = self(*arguments)
        assert found == code, said
        return said


class Command:
    """A running `prefopt` command."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self.log.read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = HANG_S) -> int:
        """Its exit code, -N if signal N ended it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running:\n{self.output}"
        return self.process.exitcode

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float = HANG_S) -> None:
        """Returns the moment ``reached()`` holds; fails if the command ends before, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.is_alive(), f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"never reached {what}:\n{self.output}"
            time.sleep(0.001)


@contextlib.contextmanager
def forked(
    target: Callable[..., int], *arguments: Any, log: Path, environment: Mapping[str, str]
) -> Iterator[Command]:
    """Starts ``target(*arguments)``, whose result is its exit code; it does not outlive the block.

    Args:
        log: where its stdout and stderr go.
        environment: all of it, as for `subprocess`.
    """
    log.touch()
    process = fork_server.fork(_run, target, arguments, str(log), dict(environment), daemon=True)
    process.start()
    try:
        yield Command(process, log)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def prefopt(
    *arguments: str, log: Path, entry: Callable[[Sequence[str]], int] = main, **environment: str
) -> contextlib.AbstractContextManager[Command]:
    """Starts ``prefopt ARGUMENTS`` with its output in ``log``, and more variables than this process has.

    ``entry`` stands for the command's own `main` where a test starts what it starts by other means.
    """
    return forked(_enter, entry, *arguments, log=log, environment={**os.environ, **environment})


def run(
    *arguments: str, log: Path, entry: Callable[[Sequence[str]], int] = main, **environment: str
) -> tuple[int, str]:
    """``(exit code, output)`` of ``prefopt ARGUMENTS``."""
    with prefopt(*arguments, log=log, entry=entry, **environment) as command:
        return command.wait(), command.output


def _enter(entry: Callable[[Sequence[str]], int], *arguments: str) -> int:
    return entry(arguments)


def _run(
    target: Callable[..., int], arguments: tuple[Any, ...], log: str, environment: dict[str, str]
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    raise SystemExit(target(*arguments))


def measured(*arguments: str) -> tuple[int, float, float]:
    """``(exit code, seconds of CPU, peak MiB)`` of ``prefopt ARGUMENTS``, in a fork that has its imports done."""
    here, there = fork_server.CONTEXT.Pipe(duplex=False)
    process = fork_server.fork(_measure, arguments, dict(os.environ), there)
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _measure(
    arguments: tuple[str, ...], environment: Mapping[str, str], answer: Connection
) -> None:
    os.environ.update(environment)
    started = time.process_time()
    code = main(arguments)
    taken = time.process_time() - started
    # Not ru_maxrss, which a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    answer.send((code, taken, int(status.split("VmHWM:")[1].split()[0]) / 1024))
