"""Runs model-written Python in a process that can hurt nobody: what holds, and what does not.

Promised on Linux (x86_64, arm64), with root's rights or without, and tried in the child before each program
(`prefopt.signals.sandbox_promises` is the list; ``prefopt doctor`` shows it):

- ``limits``: wall and CPU time, memory, size and number of open files, amount of output; ``threads``;
- ``network``: no socket but a connected pair within the program;
- ``new_processes``: no fork, no other program;
- ``other_processes``: none is signalled, read, written, traced or set, the parent included;
- ``reads``: its own directory and Python's libraries, nothing else: no keys, no data, no source of the run. An
  empty environment, no descriptor of the parent;
- ``changes``: nothing outside its directory; mode, owner, times, attributes and locks of no file at all (but for
  the record locks that SQLite takes, exclusive ones on its own files only);
- ``privileges``: none, root's neither; no namespace, no clock, no kernel interface for administrators;
- ``lifetime``: it ends with the process that started it.

A machine where one of these does not hold runs nothing, and says which; `Limits.accept` takes the risk by
name. What holds them: an allow list of system calls (seccomp), Landlock, a user or a user namespace of its own.

Not promised: that other files cannot be seen to exist (``stat``), an exact bound on the disk (the parent looks
ten times a second), a bug of the kernel, and a response that attacks its own test harness from inside: a reward
hack, not an escape. For hostile code use a virtual machine or gVisor as well: docs/sandbox.md.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import SignalError

if sys.platform != "win32":  # compiled here, once: the child writes no bytecode
    from prefopt.signals import sandbox_promises, sandbox_walls  # noqa: F401

_logger = logging.getLogger(__name__)

Verdict = Literal["passed", "failed", "timeout", "output"]
Promise = Literal[
    "limits",
    "threads",
    "network",
    "new_processes",
    "other_processes",
    "reads",
    "changes",
    "privileges",
    "lifetime",
]
"""What the sandbox promises, by name; see the module."""

_CHILD = Path(__file__).with_name("sandbox_child.py")
_STARTUP_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.1
_RESULT_BYTES = 1 << 17
"""More than a child has to say of itself; a program that says more on its pipe is stopped."""


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
    threads: int = 128
    """Most it may have at a time, with the first. Where neither root's rights nor a user namespace are to be
    had, as many more than there are on the whole machine."""
    disk_bytes: int = 64 << 20
    """Most that its files may hold together."""
    files: int = 4096
    """Most files and directories it may have."""
    accept: tuple[Promise, ...] = ()
    """Promises without which programs run all the same, should they not hold here."""
    readable: tuple[str, ...] = ()
    """Files and directories that it may read beside Python's libraries."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """``passed``: it ran to its end. ``failed``: it raised, left early, or was killed by a limit. ``output``: it
    printed, or wrote into files, more than it may."""
    output: str
    """What it printed, cut to ``output_bytes``."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


@dataclass(frozen=True)
class Attempt:
    """One thing that must not be possible behind the walls, and what became of it here."""

    promise: str
    what: str
    held: bool
    how: str
    """The error that it met, or "possible"."""


@dataclass(frozen=True)
class Walls:
    """What the sandbox is made of on this machine, and whether it holds."""

    built: dict[str, str]
    """Wall -> what it is here; "not there: …" where there is none."""
    attempts: tuple[Attempt, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Promises that do not hold, in order."""
        return tuple(dict.fromkeys(each.promise for each in self.attempts if not each.held))


def run_program(program: str, limits: Limits) -> Outcome:
    """Runs Python source to its end, or to one of its limits. Safe to call from several threads.

    Raises: SignalError if a process cannot be started, or a promise that ``limits`` does not accept is not held
        here.
    """
    token = secrets.token_hex(16)
    run = _run(limits, {"program": program, "token": token, "examine": False})
    walls = _walls(run)
    if not run.may_run:
        raise SignalError(_refusal(walls, limits.accept))
    if walls.attempts:
        _warn(walls.broken)
    verdict = run.verdict
    if run.returncode == -signal.SIGXCPU:
        verdict = "timeout"
    if verdict is None:
        verdict = "passed" if run.said == token.encode() else "failed"
    return Outcome(verdict, run.output.decode(errors="replace"))


def examine(limits: Limits | None = None) -> Walls:
    """What the sandbox is made of here, and every attempt on it.

    Raises: SignalError if a process cannot be started or isolated at all.
    """
    return _walls(_run(limits or Limits(), {"program": "", "token": "", "examine": True}))


@dataclass(frozen=True)
class _Run:
    """What a child left behind."""

    verdict: Verdict | None
    """None: it ended by itself."""
    returncode: int
    output: bytes
    first: dict[str, Any]
    """What it said of its walls; empty if it said nothing."""
    said: bytes
    """What came after that."""

    @property
    def may_run(self) -> bool:
        return bool(self.first.get("may_run"))


def _walls(run: _Run) -> Walls:
    if "tried" in run.first:
        return Walls(run.first["built"], tuple(Attempt(*each) for each in run.first["tried"]))
    reason = run.first.get("unable") or run.output.decode(errors="replace").strip()[-2000:]
    raise SignalError(
        f"model-written code is not run: the sandbox's process did not get ready: {reason or 'it ended'}"
    )


def _refusal(walls: Walls, accepted: Sequence[str]) -> str:
    """What does not hold, and what to do."""
    lines = []
    for promise in walls.broken:
        met = [f"{a.what} ({a.how})" for a in walls.attempts if a.promise == promise and not a.held]
        more = f" and {len(met) - 3} more" if len(met) > 3 else ""
        note = ", accepted" if promise in accepted else ""
        says = sandbox_promises.PROMISES[promise]
        lines.append(f"  {promise}{note} ({says}): {'; '.join(met[:3])}{more}")
    missing = [
        f"{name} ({what})" for name, what in walls.built.items() if what.startswith("not there")
    ]
    return (
        "model-written code is not run: this machine does not hold what the sandbox promises\n"
        + "\n".join(lines)
        + (f"\n  missing: {', '.join(missing)}" if missing else "")
        + "\n  what to do: a kernel with Landlock (Linux 5.13, `landlock` in its list of LSMs) and seccomp; "
        "`prefopt doctor` tries all of it. Where something else guards this machine (a virtual machine, a "
        f"container that holds nothing else), accept the rest by name: accept: [{', '.join(walls.broken)}]"
    )


@functools.cache
def _warn(broken: tuple[str, ...]) -> None:
    _logger.warning(
        "model-written code runs although the sandbox does not hold here: %s. The settings accept it "
        "(`accept`); `prefopt doctor` shows what is missing",
        ", ".join(broken),
    )


# --- one process ---------------------------------------------------------------------------------


def _run(limits: Limits, orders: dict[str, Any]) -> _Run:
    with _folder() as root, _result_pipe() as (read_fd, write_fd):
        home = os.path.join(root, "home")
        whole = {
            **orders,
            "result_fd": write_fd,
            "parent": os.getpid(),
            "outside": os.path.join(root, "outside"),
            "cpu_s": math.ceil(limits.cpu_s),
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "threads": limits.threads,
            "accept": limits.accept,
            "readable": limits.readable,
        }
        process = _start(home, write_fd)
        os.close(write_fd)
        try:
            verdict, output, result = _watch(
                process, json.dumps(whole).encode(), read_fd, home, limits
            )
        finally:
            _kill(process)
    first, _, rest = result.partition(b"\n")
    try:
        said = json.loads(first)
    except ValueError:  # it ended before it could say anything
        said = {}
    return _Run(verdict, process.returncode, output, said if isinstance(said, dict) else {}, rest)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder with the program's directory, ``home``, and a file ``outside`` it that is there to be tried.

    A program may leave anything in its directory: what `shutil` cannot remove (directories nested a thousand
    deep, without the right to list them), `rm` does.
    """
    root = tempfile.mkdtemp(prefix="prefopt-sandbox-")
    try:
        os.mkdir(os.path.join(root, "home"), 0o700)
        with open(os.path.join(root, "outside"), "w") as file:
            file.write("not for the program")
            os.fchmod(file.fileno(), 0o666)
        yield root
    finally:
        try:
            shutil.rmtree(root)
        except (OSError, RecursionError):
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
                subprocess.run([*command, "--", root], capture_output=True, check=False)
        if os.path.exists(root):
            _logger.warning("%s: what a program left could not be removed", root)


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
    environment = {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=home,
        env={**environment, "OMP_NUM_THREADS": "1"},
        pass_fds=(result_fd,),
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen[bytes], orders: bytes, result_fd: int, home: str, limits: Limits
) -> tuple[Verdict | None, bytes, bytes]:
    """``(verdict, output, result)`` once the program ended (verdict None), took too long or said too much."""
    assert process.stdin is not None and process.stdout is not None
    output_fd = process.stdout.fileno()
    received = {output_fd: b"", result_fd: b""}
    most = {output_fd: limits.output_bytes, result_fd: _RESULT_BYTES}
    # The clock of the program starts when it does, not while a busy machine starts its interpreter.
    end, started = time.monotonic() + _STARTUP_TIMEOUT_S, False
    verdict: Verdict | None = None
    with (
        selectors.DefaultSelector() as selector,
        _Sender(process.stdin, orders, selector) as sender,
    ):
        for descriptor in received:
            selector.register(descriptor, selectors.EVENT_READ)
        while verdict is None and any(fd in selector.get_map() for fd in received):
            left = end - time.monotonic()
            for key, _ in selector.select(max(0.0, min(left, _LOOK_EVERY_S))):
                if key.fd not in received:
                    sender.send()
                    continue
                chunk = os.read(key.fd, 65536)
                received[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
            if not started and b"\n" in received[result_fd]:
                started, end = True, time.monotonic() + limits.wall_s
            if time.monotonic() >= end:
                verdict = "timeout"
            elif any(len(received[fd]) > most[fd] for fd in received) or _overfull(home, limits):
                verdict = "output"
    return verdict, received[output_fd][: limits.output_bytes], received[result_fd]


class _Sender:
    """Writes to a process that may not read, as fast as it does."""

    def __init__(self, pipe: Any, what: bytes, selector: selectors.BaseSelector) -> None:
        self.pipe, self.left, self.selector = pipe, memoryview(what), selector
        os.set_blocking(pipe.fileno(), False)

    def __enter__(self) -> _Sender:
        self.selector.register(self.pipe.fileno(), selectors.EVENT_WRITE)
        return self

    def send(self) -> None:
        try:
            self.left = self.left[os.write(self.pipe.fileno(), self.left) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.left = self.left[:0]
        if not self.left:
            self.selector.unregister(self.pipe.fileno())
            self.pipe.close()

    def __exit__(self, *_: object) -> None:
        if not self.pipe.closed:
            self.pipe.close()


def _overfull(home: str, limits: Limits) -> bool:
    """Whether there are more or larger files than allowed. What cannot be listed is too much."""
    count = size = 0
    folders = [home]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                    count += 1
                    if count > limits.files or size > limits.disk_bytes:
                        return True
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                return True
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
