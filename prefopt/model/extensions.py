"""What DeepSpeed compiles when it starts: said while one waits for it, and a lock that nobody holds is named."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from prefopt.errors import ConfigError
from prefopt.report.bars import waiting

# A lock without a holder here may be held on another machine that shares the home directory; no operator of
# DeepSpeed takes this long to compile.
_STALE_AFTER_S = 900.0


@contextlib.contextmanager
def compiling(accelerator: Accelerator) -> Iterator[None]:
    """Around `Accelerator.prepare`: under DeepSpeed, says what it may be waiting for.

    Raises: ConfigError for a lock whose process is gone; torch would wait for it for ever.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    root = extensions_root()
    check_locks(root)
    what = "DeepSpeed: preparing (where an operator is not compiled yet, that is a minute or two)"
    with waiting(what, detail=lambda: _suspects(root)):
        yield


def extensions_root() -> Path:
    """Where torch keeps what it compiles: one directory an operator, possibly one level down."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def check_locks(root: Path) -> None:
    """Raises ConfigError for the locks under ``root`` that no process holds any more.

    torch makes the file ``lock`` in an operator's directory, keeps it open while it compiles, and deletes it;
    other processes wait until it is gone. A process that is killed leaves it behind.
    """
    stale = [str(lock) for lock in unheld_locks(root) if _age_s(lock) > _STALE_AFTER_S]
    if stale:
        names = " ".join(stale)
        raise ConfigError(
            f"{names}: left behind by a process that was killed while it compiled an operator of DeepSpeed, which "
            f"would now wait for it for ever. Delete it and start again: rm {names}"
        )


def unheld_locks(root: Path) -> list[Path]:
    """The locks that no process of this machine has open; without /proc nobody can be seen, and it is all."""
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    held = _open_files() if locks else set()
    return [lock for lock in locks if lock.resolve() not in held]


def _suspects(root: Path) -> str:
    names = " ".join(map(str, unheld_locks(root)))
    return (
        f"; no process of this machine holds {names}: if none elsewhere does, rm it"
        if names
        else ""
    )


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # let go in the meantime
        return 0.0


def _open_files() -> set[Path]:
    """Files that processes on this machine have open, as far as this user may see."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found.add(Path(os.readlink(link)))
    return found
