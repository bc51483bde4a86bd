"""A data file opened for reading: gzip looked through, and whatever is not what its name says named."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path
from typing import IO

from prefopt.errors import DataError

_MOST_TIMES = 500
"""An archive that grows more than so many times over is made to fill memory: text grows 3 to 30 times."""
_ANY_TIMES_BYTES = 256 << 20
"""Below this size it does no harm."""
_GZIP = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 18


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of ``path``, decompressed where its name ends in ``.gz``.

    Raises: DataError for a file of another kind than its name says; while it is read, for an archive that
        expands beyond all measure. OSError where there is nothing to open.
    """
    named_gzip = path.suffix.lower() == ".gz"
    file = path.open("rb")
    try:
        head = file.read(64)
        file.seek(0)
        if head and named_gzip and not head.startswith(_GZIP):
            raise DataError(
                f"{path}: is named .gz and is no gzip archive; rename it or fetch it again"
            )
        if not named_gzip:
            check_kind(path, head)
    except BaseException:
        file.close()
        raise
    if not named_gzip or not head:
        return file
    return io.BufferedReader(_Unpacked(path, file), _BUFFER_BYTES)


def check_kind(path: Path, head: bytes) -> None:
    """Raises DataError where the first bytes are those of another kind of file than ``path`` is named after."""
    for magic, kind in _KINDS:
        if head.startswith(magic) and not str(path).lower().endswith(f".{kind.split()[0]}"):
            raise DataError(f"{path}: is {_ADVICE[kind]}")


class _Unpacked(io.RawIOBase):
    """The content of a gzip archive, as long as it stays in proportion."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._most = max(_ANY_TIMES_BYTES, _MOST_TIMES * path.stat().st_size)
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._gzip.read(len(buffer))
        self._total += len(data)
        if self._total > self._most:
            raise DataError(
                f"{self._path}: the archive expands to more than {_MOST_TIMES} times its size "
                f"({self._total >> 20:,} MiB so far), which no text does. If it is right, unpack it first"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._gzip.close()
        self._file.close()
        super().close()


_KINDS = (
    (_GZIP, "gz"),
    (b"PAR1", "parquet"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"PK\x03\x04", "zip"),
    (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"version https://git-lfs", "lfs"),
)
_ADVICE = {
    "gz": "a gzip archive; give its name the ending .gz",
    "parquet": "a Parquet file; give its name the ending .parquet",
    "utf-32": "UTF-32 text; convert it with iconv -f UTF-32 -t UTF-8",
    "utf-16": "UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    "zip": "a zip archive; unpack it",
    "zst": "a Zstandard archive; unpack it, or compress it with gzip",
    "xz": "an xz archive; unpack it, or compress it with gzip",
    "lfs": "a Git LFS pointer in place of the file; run git lfs pull where it was cloned",
}
