"""One holder of a directory at a time: a run, a build, a schedule, an evaluation.

The lock is the system's (POSIX, so that a forked child does not keep it): it ends with the process that has it,
however that ends, on a local disk and on NFS or Lustre with locks. Who holds it stands in a file of its own
beside it, since closing any handle of the locked file would give the lock up. That file alone decides where locks
are missing, or hold on one machine only (NFS with `nolock` or `local_lock`, Lustre with `localflock`): by the
process and its start time on this machine, by a sign of life every few seconds from another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from prefopt.errors import InUseError
from prefopt.storage.cache import write_whole, writing
from prefopt.storage.json_text import parse_json
from prefopt.storage.reading import as_object

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder.json"
_PROC = Path("/proc")
_BEAT_S = 5.0
_SILENT_S = 30.0
"""Without a sign of life for so long, a holder on another machine is taken for dead."""
_SETTLE_S = 1.0
_POLL_S = 0.5
_NO_ROOM = "Make room, or give a directory that can be written to, and run the same command again"


@dataclass(frozen=True)
class Holder:
    """Who holds a directory."""

    host: str
    system: str
    """What a process number means something in: one start of a machine, one container."""
    pid: int
    started: str | None
    """When the process started, in the system's own count: tells it from a later one of its number."""
    since: str
    command: str
    token: str

    def is_here(self) -> bool:
        """Would this process see it?"""
        return (self.host, self.system) == (socket.gethostname(), _system())

    def lives(self) -> bool:
        """Is the process still there? Only for one that `is_here`."""
        return self.started is not None and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


@contextlib.contextmanager
def held(root: Path, *, work: str, advice: str = "") -> Iterator[None]:
    """Holds ``root`` for this process until the block ends, or the process does.

    Args:
        root: made where it is not there.
        work: what is done in it: ``run``, ``build``.
        advice: what else to do, after waiting for the other or stopping it.

    Raises: InUseError that says who has it; DataError if it cannot be made or written to.
    """
    path = root / LOCK_FILE
    with writing(path, _NO_ROOM):
        root.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    with file:
        locked = _lock(file, root, work, advice)
        _refuse_living(root, work, advice, locked=locked)
        me = _myself()
        with writing(root, _NO_ROOM):
            write_whole(root / HOLDER_FILE, json.dumps(asdict(me), indent=1) + "\n")
        if not locked:
            _refuse_second(root, me, work, advice)
        with _sign_of_life(root / HOLDER_FILE):
            try:
                yield
            finally:
                if _read(root) == me:
                    (root / HOLDER_FILE).unlink(missing_ok=True)


def refuse_if_held(root: Path, *, work: str, advice: str = "") -> None:
    """Raises InUseError if a living process of this machine holds ``root``: early, before `held` decides."""
    holder = _read(root)
    if holder is not None and holder.pid != os.getpid() and holder.is_here() and holder.lives():
        raise InUseError(_in_use(root, work, str(holder), advice))


def _lock(file: Any, root: Path, work: str, advice: str) -> bool:
    """Takes the system's lock; False where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = _read(root)
        who = "it just began" if holder is None else str(holder)
        raise InUseError(_in_use(root, work, who, advice)) from error
    except OSError as error:
        logger.warning(
            "%s: cannot be locked (%s); who is at work there is known by %s alone",
            root, error.strerror, HOLDER_FILE,
        )  # fmt: skip
        return False
    return True


def _refuse_living(root: Path, work: str, advice: str, *, locked: bool) -> None:
    """Raises InUseError if whoever left a record here is at work still."""
    holder = _read(root)
    if holder is None or (holder.is_here() and holder.pid == os.getpid()):
        return
    if holder.is_here():
        if not locked and holder.lives():
            raise InUseError(_in_use(root, work, str(holder), advice))
    elif _beats(root, holder):
        gone = f"{advice} If that process is gone, delete {root / HOLDER_FILE}"
        raise InUseError(_in_use(root, work, str(holder), gone.strip()))
    logger.info("%s: was left by one that has ended (%s)", root, holder)


def _beats(root: Path, holder: Holder) -> bool:
    """Does a holder on another machine give a sign of life? Waits until it does, or has been silent for long."""
    path, first, said = root / HOLDER_FILE, _beat_of(root), False
    while first is not None and _now_at(root) - first < _SILENT_S:
        if not said:
            logger.info("%s: waiting for a sign of life of %s", path, holder)
            said = True
        time.sleep(_POLL_S)
        if (now := _beat_of(root)) != first:
            return now is not None  # it has ended meanwhile, where the record is gone
    return False


def _beat_of(root: Path) -> float | None:
    """Time of the last sign of life; asked through a handle, for which NFS goes to its server."""
    try:
        with (root / HOLDER_FILE).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now_at(root: Path) -> float:
    """The time by the clock that stamps files of ``root``, which may be a server's."""
    probe = root / f".now-{secrets.token_hex(4)}"
    with writing(probe, _NO_ROOM):
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _refuse_second(root: Path, me: Holder, work: str, advice: str) -> None:
    """Of two that begin at once where there are no locks, the later record stands."""
    time.sleep(_SETTLE_S)
    holder = _read(root)
    if holder is not None and holder != me:
        raise InUseError(_in_use(root, work, str(holder), advice))


@contextlib.contextmanager
def _sign_of_life(path: Path) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_S):
            with contextlib.suppress(
                OSError
            ):  # deleted by hand, or a server that is away for a while
                os.utime(path)

    thread = threading.Thread(target=beat, name="sign-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _in_use(root: Path, work: str, who: str, advice: str) -> str:
    return (
        f"{root}: is in use by another {work} ({who}). Two would write over each other's files: wait for it or "
        f"stop it, then run the same command again. {advice}"
    ).rstrip()


_KEYS = {
    "host": str, "system": str, "pid": int, "started": (str, NoneType), "since": str, "command": str, "token": str,
}  # fmt: skip


def _read(root: Path) -> Holder | None:
    """Who the record says; None without one, or for one that a kill or a full disk left unreadable."""
    try:
        raw = parse_json((root / HOLDER_FILE).read_text(encoding="utf-8"))
        return Holder(**as_object(raw, _KEYS))
    except (OSError, ValueError, TypeError):
        return None


def _myself() -> Holder:
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        system=_system(),
        pid=pid,
        started=_started(pid),
        since=datetime.now(UTC).astimezone().isoformat(sep=" ", timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        token=secrets.token_hex(8),
    )


def _system() -> str:
    """The start of this machine and the space that its process numbers are of."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink(_PROC / "self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none, or it is a zombie."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else fields[18]
