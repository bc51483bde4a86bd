"""Schedules for tests: their steps in this process, or as forks of a warm one that can be killed."""

from __future__ import annotations

import ctypes
import os
import random
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from data_pipelines.schedule import commands
from prefopt import cli
from tests.recipes.commands import prefopt

_PR_SET_PDEATHSIG = 1


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps run as the same commands, in this process: no start of Python and torch for each. What was run."""
    ran: list[str] = []

    def start(command: Sequence[str]) -> int:
        ran.append("prefopt " + shlex.join(command[3:]))
        return cli.main(list(command[3:]))

    monkeypatch.setattr(commands, "run_command", start)
    return ran


def main(arguments: Sequence[str]) -> int:
    """``prefopt ARGUMENTS``, whose steps are forks of it: processes of their own that end with it."""
    commands.run_command = _fork
    return cli.main(list(arguments))


def run_and_kill(
    file: Path, out: Path, num_files: int, *, command: str, seed: int, kills: int
) -> None:
    """Runs a schedule to its end, killed on the way at so many random moments, counted in files of its output.

    Args:
        file: the schedule.
        out: its output_dir.
        num_files: that a calm run leaves.
        command: `prefopt data COMMAND`.
        seed: of the moments.
        kills: how many.
    """
    log = file.with_suffix(".log")
    moments = sorted(random.Random(seed).sample(range(1, num_files), kills))
    for moment in moments:
        with prefopt("data", command, str(file), log=log, entry=main) as process:
            process.wait_until(
                lambda m=moment: count_files(out) >= m, f"{moment} of {num_files} files"
            )
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    with prefopt("data", command, str(file), log=log, entry=main) as process:
        assert process.wait() == 0, process.output


def contents(folder: Path, files: Iterable[Path]) -> dict[str, bytes]:
    """The bytes of files by their path below ``folder``; what a killed writer left behind is nobody's."""
    whole = [path for path in sorted(files) if not path.name.startswith(".tmp-")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in whole}


def count_files(folder: Path) -> int:
    """Files below ``folder``, without those that are being written."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return sum(not name.startswith(".tmp-") for name in names)


def _fork(command: Sequence[str]) -> int:
    assert list(command[:3]) == [sys.executable, "-m", "prefopt.cli"]
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        code = 1
        try:
            code = cli.main(list(command[3:]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
