"""What starting other processes needs: a clean environment, a log to quote, an end in every case."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import prefopt

# What launchers (accelerate, torchrun, DeepSpeed) tell their workers: an engine that read it would wait for
# a process group that it is no member of.
_LAUNCHER_NAMES = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE",
}  # fmt: skip
_LAUNCHER_PREFIXES = ("MASTER_", "ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PARALLELISM_CONFIG_")
_TAIL_LINES = 30


def is_launcher_variable(name: str) -> bool:
    """Was this environment variable set by a launcher for its own workers?"""
    return name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what its launcher set, with ``extra``, able to import prefopt."""
    kept = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
    home = str(Path(prefopt.__file__).resolve().parents[1])
    paths = [home, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **(extra or {})}


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_tail(path: Path, num_lines: int = _TAIL_LINES) -> str:
    """The end of a log, introduced by its path, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 32768))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"its log {path} cannot be read: {error}"
    if not lines:
        return f"its log {path} is empty"
    return f"the end of {path}:\n" + "\n".join(f"  | {line}" for line in lines[-num_lines:])


def describe_exit(code: int) -> str:
    """An exit code in words: ``exit code 1``, ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that ``pid`` leads, if there still is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _opened(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file


class GuardedProcess:
    """A command in a process group of its own that ends with this process, however this process ends.

    A guard (`prefopt.engines.guard`) stands between: it kills the group when the pipe to us closes, which
    also happens on SIGKILL, and from whichever thread it was started. The terminal's Ctrl-C does not reach it.

    Args:
        command: program and arguments.
        environment: whole environment of the command.
        log: file its output is added to; None: our standard error.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None
    ) -> None:
        with _opened(log) as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "prefopt.engines.guard", *command],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline()  # empty where the command could not be started
        self.pid = int(line) if line.strip() else None
        """Of the command, which leads its process group."""

    def poll(self) -> int | None:
        """Exit code of the command (negative: signal), None while it runs."""
        code = self._guard.poll()
        return code - 256 if code is not None and code > 128 else code

    def stop(self, grace_s: float = 10.0) -> None:
        """Ends the command and everything in its group: politely, then not. May be called twice."""
        assert self._guard.stdin is not None and self._guard.stdout is not None
        if self._guard.stdin.closed:
            return  # by now its pid may be another process's
        with contextlib.suppress(OSError):
            self._guard.stdin.write(f"{grace_s}\n".encode())
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(grace_s + 5)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self.pid is not None:
            kill_group(self.pid)
        self._guard.stdout.close()


class Watchdog:
    """Has processes killed when this process ends without `dismiss`, however it ends.

    For children that a library starts in our process group and that do not notice our death. To be made before
    they are started with `variables` in their environment; what has none (a fork) is told by `add`.
    """

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        # A process that gives itself a title (setproctitle) does so in the memory that /proc shows as its
        # environment, unless it is asked not to.
        self.variables = {"PREFOPT_WATCHED": mark, "SPT_NOENV": "1"}
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "prefopt.engines.guard", "--watch", mark],
            env=clean_environment(),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def add(self, pids: Sequence[int]) -> None:
        """Watches these as well."""
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.write("".join(f"{pid} " for pid in pids).encode())
            self._guard.stdin.flush()

    def dismiss(self) -> None:
        """Ends the watch and kills nobody. To be called before the processes are ended. May be called twice."""
        assert self._guard.stdin is not None
        if self._guard.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._guard.stdin.write(b"done")
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        self._guard.wait()


def wait_briefly(deadline: float, longest_s: float = 0.25) -> bool:
    """Sleeps ``longest_s``, or to the deadline (`time.monotonic`) if that is sooner; False if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    time.sleep(min(longest_s, left))
    return True
