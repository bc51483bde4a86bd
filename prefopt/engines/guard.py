"""``python -m prefopt.engines.guard COMMAND …``: runs a command that never outlives whoever started it.

Standard library only: it must start in milliseconds. Its standard input is a pipe whose other end only the
starter holds: when that closes, the command's process group is ended, with grace if the starter said so
(seconds, as text) and else at once. Prints the command's pid; exits as the command did (256 + signal mod 256
for a signal).

``… guard --watch MARK`` starts nothing. When the starter is gone it kills the processes whose pids it was told,
and all whose environment held MARK when they began, unless it was told ``done``. For children that a library
starts, and that would live on; one that a library is just starting has no pid that anybody knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_TRACKER_S = 3.0
_SETTLED_S = 2.0
_LONGEST_HUNT_S = 30.0

_WATCH = "--watch"
_DONE = "done"


def main(arguments: list[str]) -> int:
    """Does what the module says; returns the exit code."""
    starter = os.getppid()
    if arguments[0] == _WATCH:
        return watch(arguments[1], starter)
    return guard(arguments, starter)


def watch(mark: str, starter: int) -> int:
    """Kills the pids it was told, and what began with ``mark``, when the pipe closes without ``done``."""
    said = _heard(starter).split()
    if _DONE not in said:
        _kill(int(pid) for pid in said)
        _kill_marked(mark)
    return 0


def _kill_marked(mark: str) -> None:
    """Until none was there for a while: one may be between its fork and its own environment, or start another."""
    began = found = time.monotonic()
    while (now := time.monotonic()) < min(found + _SETTLED_S, began + _LONGEST_HUNT_S):
        marked = [pid for pid in _running() if mark.encode() in _read(f"/proc/{pid}/environ")]
        if victims := [pid for pid in marked if not _is_tracker(pid)]:
            _kill(victims)
            found = now
        time.sleep(_POLL_S)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def guard(command: list[str], starter: int) -> int:
    """Runs ``command`` until it ends or standard input does; returns the exit code to pass on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # the guard has one thread: safe, and the signal means the guard
    )
    try:
        os.write(1, f"{child.pid}\n".encode())
        grace = _heard(starter, lambda: child.poll() is None)
        if child.poll() is None and grace:
            _end_politely(child, float(grace))
    finally:
        _kill_group(child.pid)
    code = child.wait()
    return code if code >= 0 else 256 + code


def _heard(starter: int, goes_on: Callable[[], bool] = lambda: True) -> str:
    """What the starter said before it closed the pipe or ended; or so far, once ``goes_on`` is false.

    Its end is asked for as well: a process it has forked may hold the pipe open.
    """
    said = b""
    while goes_on() and os.getppid() == starter:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable:
            data = os.read(0, 64)
            if not data:
                break
            said += data
    return said.decode().strip()


def _end_politely(child: subprocess.Popen[bytes], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    child.terminate()
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _kill_group(group: int) -> None:
    """Kills every process of the group, Python's resource trackers last.

    A tracker ends by itself when the processes it serves have, and deletes the shared memory that they were
    killed too early to delete: vLLM's queues, a quarter of a gigabyte a server.
    """
    _kill(pid for pid in _members(group) if not _is_tracker(pid))
    deadline = time.monotonic() + _TRACKER_S
    while _members(group) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> list[int]:
    """Processes of the group that still run; none where there is no /proc."""
    found = []
    for pid in _running():
        # pid (name) state parent group …: the name may hold anything, so count from its last bracket
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if len(fields) > 2 and int(fields[2]) == group and fields[0] not in (b"Z", b"X"):
            found.append(pid)
    return found


def _running() -> Iterator[int]:
    """Every process; none where there is no /proc."""
    return map(int, filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []))


def _is_tracker(pid: int) -> bool:
    return b"resource_tracker" in _read(f"/proc/{pid}/cmdline")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it has just ended
        return b""


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
