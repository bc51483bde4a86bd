"""One process of the sandbox: started, told, listened to, bounded from outside, ended.

`prefopt.signals.sandbox` decides what it is told and what its end means. Whatever a process says or leaves, this
side survives it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
_DEEPEST = 100
_LOADED = b"loaded\n"
_FIRST_BYTES = 1 << 16
"""Room for what a process says of its walls, before the program runs."""


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
    """Most files and directories it may have, nested at most 100 deep."""
    accept_risks: tuple[Promise, ...] = ()
    """Promises without which programs run all the same, should they not hold here."""
    readable: tuple[str, ...] = ()
    """Files and directories that it may read beside Python's libraries."""


def message(content: bytes) -> bytes:
    """As `sandbox_child` reads it: the length in eight bytes, then as many bytes."""
    return len(content).to_bytes(8, "big") + content


class Running:
    """One process, what it is to be told and what it said."""

    def __init__(
        self, process: subprocess.Popen[bytes], orders_fd: int, result_fd: int, home: str
    ) -> None:
        self.process = process
        self.orders_fd = orders_fd
        self.result_fd = result_fd
        self.home = home
        self.waiting = b""
        self.output = b""
        self.result = b""
        self.returncode: int | None = None

    def say(self, orders: dict[str, Any]) -> None:
        self.waiting += message(json.dumps(orders).encode())

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
                left = max(0.0, min(end - time.monotonic(), _LOOK_EVERY_S))
                for key, _ in selector.select(left):
                    if key.fd == self.orders_fd:
                        if not self._send():
                            selector.unregister(self.orders_fd)
                    elif not self._receive(key.fd):
                        selector.unregister(key.fd)
                        open_ends.discard(key.fd)
                if not started and b"\n" in self.result:
                    started, end = True, time.monotonic() + limits.wall_s
                if self.meddled:  # what waits for an answer would wait for ever
                    return None
                if not told and self.said.startswith(_LOADED):
                    told = True
                    self.waiting += later
                    if self.orders_fd not in selector.get_map():
                        selector.register(self.orders_fd, selectors.EVENT_WRITE)
                if time.monotonic() >= end:
                    return "timeout"
                if self._too_much(limits):
                    return "output"
        return None

    @property
    def first(self) -> bytes:
        """What it said of its walls, before the program ran."""
        return self.result.partition(b"\n")[0]

    @property
    def said(self) -> bytes:
        """What came after that."""
        return self.result.partition(b"\n")[2]

    @property
    def meddled(self) -> bool:
        """Whether the program wrote here itself before it was through."""
        return bool(self.said) and not _LOADED.startswith(self.said[: len(_LOADED)])

    def _too_much(self, limits: Limits) -> bool:
        most = limits.output_bytes
        if len(self.output) > most or len(self.result) > most + _FIRST_BYTES:
            return True
        return _overfull(self.home, limits)

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
def start(stdin: str | None, limits: Limits, orders: dict[str, Any]) -> Iterator[Running]:
    """A process in a directory of its own; it is dead, and the directory gone, afterwards.

    Args:
        stdin: what it reads; None: nothing, and what it writes to standard error is output.
        limits: that it sets itself.
        orders: what else it is told at once.
    """
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(_folder())
        home = os.path.join(root, "home")
        orders_out, orders_in, result_out, result_in = (*os.pipe(), *os.pipe())
        for descriptor in (orders_in, result_out):
            stack.callback(os.close, descriptor)
        os.set_blocking(orders_in, False)
        try:
            process = _start(home, (orders_out, result_in), stdin)
        finally:
            os.close(orders_out)
            os.close(result_in)
        running = Running(process, orders_in, result_out, home)
        running.say({**orders, **_bounds(limits, root, (orders_out, result_in))})
        try:
            yield running
        finally:
            _kill(process)
            running.returncode = process.returncode


def _bounds(limits: Limits, root: str, descriptors: tuple[int, int]) -> dict[str, Any]:
    """What `sandbox_walls` and `sandbox_promises` are told."""
    return {
        "kept": descriptors,
        "parent": os.getpid(),
        "outside": os.path.join(root, "outside"),
        "cpu_s": math.ceil(limits.cpu_s),
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "threads": limits.threads,
        "accept_risks": limits.accept_risks,
        "readable": limits.readable,
    }


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


def _start(home: str, descriptors: tuple[int, int], stdin: str | None) -> subprocess.Popen[bytes]:
    # Cleared, not filtered: keys of judges and trackers live in the environment. Each thread of a BLAS takes
    # address space, and each heap of the C library 64 MB of it: fifty threads would not fit.
    environment = {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    # a file, not a pipe: programs ask for its size; in their directory: some open it as /dev/stdin
    with tempfile.TemporaryFile(dir=home) as given:
        os.fchmod(given.fileno(), 0o644)
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


def _overfull(home: str, limits: Limits) -> bool:
    """Whether there are more or larger files than allowed. What cannot be listed is too much, and what is nested
    so deep that looking takes long."""
    count = size = 0
    folders, deepest = [home], home.count("/") + _DEEPEST
    while folders:
        folder = folders.pop()
        if folder.count("/") > deepest:
            return True
        try:
            with os.scandir(folder) as entries:
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
