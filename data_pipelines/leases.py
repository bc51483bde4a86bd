"""Leases on shared storage: which worker has which shard, without a server.

A lease is a file made with O_EXCL. Its holder touches it; one that has not been touched for ``lease_s``, or
whose process is known to be dead, is taken over by renaming it away, which only one worker can do. The clock
is the storage's own (the time stamps it gives), so workers' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import DataError

_TOUCHES = 6
"""Touches within a lease's life: a holder may miss some and keep it."""


class Leases:
    """The leases one worker takes.

    Args:
        directory: for the files; the same for all workers.
        lease_s: seconds without a touch after which a lease is free.
    """

    def __init__(self, directory: Path, lease_s: float) -> None:
        self.directory = directory
        self.lease_s = lease_s
        self._owner = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
        }

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Yields whether this worker now has ``name``; the lease is kept alive until the block ends."""
        path = self.directory / f"{name}.lease"
        if not self._take(path):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            if self.holds(name):
                path.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Is the lease still this worker's?"""
        return _read(self.directory / f"{name}.lease").get("token") == self._owner["token"]

    def holders(self) -> list[str]:
        """Every live lease of another worker, as ``name (process on host)``."""
        found = []
        for path in sorted(self.directory.glob("**/*.lease")):
            owner = _read(path)
            if owner.get("token") != self._owner["token"] and not self._is_free(path, owner):
                name = path.relative_to(self.directory).as_posix().removesuffix(".lease")
                found.append(f"{name} (process {owner.get('pid')} on {owner.get('host')})")
        return found

    def _take(self, path: Path) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            owner = _read(path)
            if not self._is_free(path, owner):
                return False
            aside = path.with_suffix(f".{uuid.uuid4().hex}.stale")
            try:
                os.rename(path, aside)  # of several workers one succeeds
            except FileNotFoundError:
                return False
            # Between the reading and the rename another worker may have taken it over: then give it back.
            if _read(aside).get("token") != owner.get("token"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path)
                aside.unlink()
                return False
            aside.unlink()
        return self._create(path)

    def _create(self, path: Path) -> bool:
        """Makes the lease with its content in one step: a reader never sees it empty."""
        draft = path.with_suffix(f".{self._owner['token']}.draft")
        try:
            draft.write_text(json.dumps(self._owner), encoding="utf-8")
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}. Make room, or give an output_dir that "
                "can be written to, and run the same command again"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _is_free(self, path: Path, owner: dict[str, Any]) -> bool:
        if owner.get("host") == self._owner["host"] and owner.get("boot") == self._owner["boot"]:
            started = _process_start(int(owner.get("pid") or 0))
            return started is None or started != owner.get("started")
        try:
            return self._now() - path.stat().st_mtime > self.lease_s
        except FileNotFoundError:
            return True

    def _now(self) -> float:
        """The storage's time: that of a file touched just now."""
        probe = self.directory / f".clock-{self._owner['token']}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _beat(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.lease_s / _TOUCHES):
            with contextlib.suppress(
                OSError
            ):  # a lease that was taken over is noticed when work is handed in
                os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _boot_id() -> str:
    """Names what process numbers are unique in: this boot, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, which with its number names it for good; None if it is gone.

    Where there is no /proc, a living process counts as the one that was meant.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"
