"""`prefopt` commands, in this process, or in one of their own to be killed, interrupted or run out of disk.

For the latter a fork server imports torch and the rest once; a command then starts in milliseconds instead
of seconds. After the imports everything is as in the installed `prefopt`: `prefopt.cli.main`, its exit code,
its stderr, its signal handlers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from prefopt.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "prefopt.cli",
        "prefopt.recipe.checks",
        "prefopt.wiring",
        "transformers.models.llama.modeling_llama",
    ]
)


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

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code, -N if signal N ended it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running:\n{self.output}"
        return self.process.exitcode

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        """Returns the moment ``reached()`` holds; fails if the command ends before, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.is_alive(), f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"never reached {what}:\n{self.output}"
            time.sleep(0.001)


@contextlib.contextmanager
def prefopt(
    *arguments: str, log: Path, entry: Callable[[Sequence[str]], int] = main, **environment: str
) -> Iterator[Command]:
    """Starts ``prefopt ARGUMENTS`` with its output in ``log``; it does not outlive the block.

    ``entry`` stands for the command's own `main` where a test starts what it starts by other means.
    """
    variables = {"OMP_NUM_THREADS": "1", **environment}
    given = (arguments, str(log), variables, entry)
    process = _CONTEXT.Process(target=_run, args=given, daemon=True)
    log.touch()
    process.start()
    try:
        yield Command(process, log)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def run(
    *arguments: str, log: Path, entry: Callable[[Sequence[str]], int] = main, **environment: str
) -> tuple[int, str]:
    """``(exit code, output)`` of ``prefopt ARGUMENTS``."""
    with prefopt(*arguments, log=log, entry=entry, **environment) as command:
        return command.wait(), command.output


def _run(
    arguments: tuple[str, ...],
    log: str,
    environment: Mapping[str, str],
    entry: Callable[[Sequence[str]], int],
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    raise SystemExit(entry(arguments))
