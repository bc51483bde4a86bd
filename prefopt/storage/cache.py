"""Where reusable files live, and how a file comes into being there: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefopt.errors import DataError

ENV_VARIABLE = "PREFOPT_CACHE"


def cache_root(override: str | Path | None = None) -> Path:
    """``override`` (a recipe's ``cache_dir``), else ``$PREFOPT_CACHE``, else ``~/.cache/prefopt``."""
    chosen = override or os.environ.get(ENV_VARIABLE) or Path.home() / ".cache" / "prefopt"
    return Path(chosen).expanduser().resolve()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that becomes ``path`` when the block ends without an error.

    Readers see the old file or the whole new one; two writers of one path leave one whole file; a
    killed writer leaves a ``.tmp-*`` file that nothing reads. The bytes are on disk before the rename.
    Raises: OSError (a full disk, no permission), after removing the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        by_umask(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def by_umask(file: Path) -> None:
    """Lets the umask decide who may read ``file``: mkstemp and safetensors make theirs private, and a group shares
    caches and models."""
    os.chmod(file, 0o666 & ~_umask())


@functools.cache  # once: setting it races with other threads that make files
def _umask() -> int:
    current = os.umask(0)  # the only portable way to read it is to set it
    os.umask(current)
    return current


AGAIN = "Make room and run the same command again"
GOES_ON = f"{AGAIN}: it goes on from here"


@contextlib.contextmanager
def writing(path: Path, advice: str = GOES_ON) -> Iterator[None]:
    """Turns what a full disk or a lost permission raises into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        why = f"{path}: cannot be written: {error.strerror or error}"
        raise DataError(f"{why}. {advice}" if advice else why) from error


def write_whole(path: Path, data: bytes | str, advice: str = GOES_ON) -> None:
    """Writes a file whole or not at all; text as UTF-8. Raises: DataError as `writing`."""
    with writing(path, advice), atomic_write(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory beside ``path`` that becomes ``path`` when the block ends without error.

    What stood at ``path`` before is replaced. Readers see the old directory or the whole new one; of two
    writers of one path the last wins; a killed writer leaves a ``.tmp-*`` directory that nothing reads.
    Raises: OSError (a full disk, no permission), after removing the temporary directory.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            by_umask(file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        _replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(temporary: Path, target: Path) -> None:
    """Renames ``temporary`` to ``target``; a full directory cannot be renamed over, so it moves first."""
    while True:
        try:
            os.rename(temporary, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = Path(tempfile.mkdtemp(prefix=".tmp-old-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):  # another process moved it away first
            os.rename(target, old)
        shutil.rmtree(old, ignore_errors=True)
