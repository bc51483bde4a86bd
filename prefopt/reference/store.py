"""A content-addressed store of reference log-probs, shared by runs, losses and learning rates.

A frozen reference gives one answer per (weights, prompt, response), so it is asked once: the first run
writes the token log-probs, and every later run on the same weights and tokens reads them, whatever its
objective, learning rate, seed or output directory.

Layout of the store: one directory per (weights, maths version, precision), holding immutable *parts*.
A part is a safetensors file whose name is the SHA-256 of its index; each response in it carries a CRC.
Writers never touch each other's files, so any number of processes and machines may share a directory
without locks. A part that is damaged or gone costs only the recomputation of what it held.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from prefopt.errors import TrainingError
from prefopt.storage.cache import atomic_write
from prefopt.storage.reading import SHAPE_ERRORS
from prefopt.types import Group, Response, TokenIds

log = logging.getLogger(__name__)

MATHS_VERSION = 1
"""Raise whenever `LogpModel`'s log-probs of given weights and tokens change by more than rounding."""

_KEY_BYTES = 16  # 128 bits: a million entries collide with probability 1e-27
_SUFFIX = ".safetensors"
_CORRUPT = ".corrupt"
# what parsing a part raises when bytes of it have changed
_DAMAGE = (*SHAPE_ERRORS, struct.error)


@dataclass(frozen=True)
class _Part:
    """A verified part: where its values start in the file."""

    path: Path
    values_at: int


@dataclass(frozen=True)
class _Index:
    """Rows of every part, sorted by key: 40 bytes a response, so a million responses cost 40 MB."""

    high: np.ndarray  # uint64, first half of the key
    low: np.ndarray  # uint64, second half
    part: np.ndarray  # int32, number of the part
    start: np.ndarray  # int64, first token within the part's values
    length: np.ndarray  # int32, tokens
    crc: np.ndarray  # uint32, of the value bytes

    @staticmethod
    def empty() -> _Index:
        return _Index(*(np.empty(0, t) for t in ("u8", "u8", "i4", "i8", "i4", "u4")))

    def merged(self, other: _Index) -> _Index:
        """Both, sorted by key. Stable, so that of two equal rows the older one comes first."""
        columns = [np.concatenate(pair) for pair in zip(self._columns, other._columns, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        return _Index(*(column[order] for column in columns))

    def without(self, part: int) -> _Index:
        keep = self.part != part
        return _Index(*(column[keep] for column in self._columns))

    def find(self, key: bytes) -> int | None:
        """Row of ``key``, or None."""
        high, low = (np.uint64(half) for half in struct.unpack(">QQ", key))
        row = int(np.searchsorted(self.high, high))
        while row < len(self.high) and self.high[row] == high:
            if self.low[row] == low:
                return row
            row += 1
        return None

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.high, self.low, self.part, self.start, self.length, self.crc


class ReferenceStore:
    """Reference log-probs of one set of weights.

    Args:
        root: cache root; the store lives in ``<root>/reference/<weights_key[:16]>-v<version>-<precision>``.
        weights_key: `prefopt.model.hashing` key of the reference's weights, dtype and adapter included.
        precision: compute precision of the forward (``train.precision``): bf16 log-probs are other
            numbers than fp32 ones, and reading them back would make the log-ratio at step 0 non-zero.

    Not thread-safe within a process. A rank sees another rank's entries after that rank's ``flush`` and
    its own ``refresh``; whether an entry is there can therefore differ between ranks, so agree on it (an
    all-reduce of what `get` did not find) before any collective forward.
    """

    def __init__(self, root: str | Path, weights_key: str, *, precision: str = "fp32") -> None:
        self.weights_key = weights_key
        self.directory = (
            Path(root) / "reference" / f"{weights_key[:16]}-v{MATHS_VERSION}-{precision}"
        )
        self._identity = f"{weights_key}-v{MATHS_VERSION}-{precision}"
        self._parts: list[_Part] = []
        self.num_dropped = 0
        """Parts that turned out damaged while they were read; what `get` gave of them is on disk no more."""
        self._seen: set[str] = set()
        self._index = _Index.empty()
        self._pending: dict[bytes, np.ndarray] = {}
        self.refresh()

    def __len__(self) -> int:
        """Entries this process can see, in parts and not yet flushed (one twice if two writers made it)."""
        return len(self._index.high) + len(self._pending)

    def get(self, group: Group) -> list[np.ndarray] | None:
        """The log-probs of a group's responses, or None unless every one is here and intact.

        Returns: per response an fp32 array (T,), nats, bit for bit what was added.
        """
        found = [self._read(response_key(group.prompt_ids, r)) for r in group.responses]
        arrays = [array for array in found if array is not None]
        return arrays if len(arrays) == len(found) else None

    def add(self, entries: Iterable[tuple[Group, Sequence[np.ndarray]]]) -> None:
        """Takes log-probs, one (T,) array a response, in the group's order; on disk only after `flush`.

        Raises: TrainingError for a wrong dtype, shape or a non-finite value: a bad reference must
            not outlive the run that made it.
        """
        for group, arrays in entries:
            _check(group, arrays)
            for response, array in zip(group.responses, arrays, strict=True):
                key = response_key(group.prompt_ids, response)
                if key not in self._pending and self._index.find(key) is None:
                    self._pending[key] = np.array(
                        array, dtype="<f4"
                    )  # a copy: callers reuse buffers

    def flush(self) -> Path | None:
        """Writes what was added since the last flush as one new part; returns its path, or None if nothing.

        A disk that is full or read-only is a warning: the entries stay readable in this process and
        are tried again at the next flush, and the run goes on.
        """
        if not self._pending:
            return None
        try:
            path = _write_part(self.directory, self._identity, self._pending)
        except OSError as error:
            log.warning(
                "reference store: cannot write to %s (%s); kept in memory", self.directory, error
            )
            return None
        if self._load(path):
            self._pending = {}
        return path

    def refresh(self) -> int:
        """Takes in parts that other processes have written since; returns how many entries came."""
        before = len(self._index.high)
        if self.directory.is_dir():
            for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
                if path.name not in self._seen and not path.name.startswith("."):
                    self._load(path)
        return len(self._index.high) - before

    def _load(self, path: Path) -> bool:
        if path.name in self._seen:
            return True
        try:
            part, rows = _read_part(path, self._identity, number=len(self._parts))
        except (OSError, *_DAMAGE) as error:
            _set_aside(path, error)
            return False
        self._seen.add(path.name)
        self._parts.append(part)
        self._index = self._index.merged(rows)
        return True

    def _read(self, key: bytes) -> np.ndarray | None:
        """The value of ``key``, checked; drops the whole part it should come from if it is not intact."""
        if key in self._pending:
            return self._pending[key].copy()
        while (row := self._index.find(key)) is not None:
            part, length = int(self._index.part[row]), int(self._index.length[row])
            start = self._parts[part].values_at + 4 * int(self._index.start[row])
            try:
                raw = _read_at(self._parts[part].path, start, 4 * length)
                if zlib.crc32(raw) != int(self._index.crc[row]):
                    raise ValueError("checksum of a value does not match")
                return np.frombuffer(raw, "<f4").copy()
            except (OSError, ValueError) as error:
                self._drop(part, error)
        return None

    def _drop(self, part: int, error: Exception) -> None:
        path = self._parts[part].path
        self.num_dropped += 1
        self._index = self._index.without(part)
        self._seen.discard(path.name)  # a rewritten part has the same name and is welcome back
        _set_aside(path, error)


def response_key(prompt_ids: TokenIds, response: Response) -> bytes:
    """16 bytes that name a response to a prompt under the present maths version."""
    digest = hashlib.sha256(f"logps-v{MATHS_VERSION}\0".encode())
    # the lengths keep (prompt ab, response c) apart from (prompt a, response bc)
    digest.update(struct.pack("<QQ", len(prompt_ids), len(response.ids)))
    digest.update(np.asarray(prompt_ids, "<i8").tobytes())
    digest.update(np.asarray(response.ids, "<i8").tobytes())
    return digest.digest()[:_KEY_BYTES]


def _check(group: Group, arrays: Sequence[np.ndarray]) -> None:
    where = f"reference log-probs of group {group.id!r}"
    if len(arrays) != len(group.responses):
        raise TrainingError(f"{where}: {len(arrays)} arrays for {len(group.responses)} responses")
    for response, array in zip(group.responses, arrays, strict=True):
        if array.dtype != np.float32 or array.shape != (len(response.ids),):
            raise TrainingError(
                f"{where}: got {array.dtype} of shape {array.shape}, expected float32 of shape "
                f"({len(response.ids)},), one value a response token"
            )
        if not np.isfinite(array).all():
            raise TrainingError(
                f"{where} are not finite: the reference model overflows or its weights are damaged. "
                "Try train.precision = 'fp32' or 'bf16'."
            )


def _write_part(directory: Path, identity: str, entries: dict[bytes, np.ndarray]) -> Path:
    lengths = np.array([len(array) for array in entries.values()], "<i8")
    tensors = {
        "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, _KEY_BYTES),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"),
        "crcs": np.array([zlib.crc32(array.tobytes()) for array in entries.values()], "<u4"),
        "logps": np.concatenate(list(entries.values())),
    }
    path = directory / f"{_index_digest(identity, tensors)}{_SUFFIX}"
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"identity": identity})
    return path


def _read_part(path: Path, identity: str, *, number: int) -> tuple[_Part, _Index]:
    """A part's index, checked against its name; values are not read.

    Raises: OSError, or one of ``_DAMAGE`` if the part is not intact.
    """
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        available = os.fstat(file.fileno()).st_size
        if size > available:
            raise ValueError("header is cut or damaged")
        header = json.loads(file.read(size))
        end = (
            8
            + size
            + max(entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__")
        )
        if available != end:
            raise ValueError(f"has {available} bytes, its header says {end}")
        index = {}
        for name, dtype in (("keys", "u1"), ("offsets", "<i8"), ("crcs", "<u4")):
            first, last = header[name]["data_offsets"]
            file.seek(8 + size + first)
            index[name] = np.frombuffer(file.read(last - first), dtype)
    if _index_digest(identity, index) != path.name.removesuffix(_SUFFIX):
        raise ValueError("index does not match its checksum")
    return _Part(path, 8 + size + header["logps"]["data_offsets"][0]), _rows(index, number)


def _rows(index: dict[str, np.ndarray], number: int) -> _Index:
    keys = index["keys"].view(">u8").reshape(-1, 2).astype("u8")
    offsets = index["offsets"]
    rows = _Index(
        high=keys[:, 0],
        low=keys[:, 1],
        part=np.full(len(keys), number, "i4"),
        start=offsets[:-1].astype("i8"),
        length=np.diff(offsets).astype("i4"),
        crc=index["crcs"],
    )
    return _Index.empty().merged(rows)


def _index_digest(identity: str, index: dict[str, np.ndarray]) -> str:
    """Covers the weights, the keys, the lengths and, through their CRCs, the values."""
    digest = hashlib.sha256(identity.encode())
    for name in ("keys", "offsets", "crcs"):
        digest.update(np.ascontiguousarray(index[name]).tobytes())
    return digest.hexdigest()[:40]


def _read_at(path: Path, offset: int, count: int) -> bytes:
    # Not a memory map: a file cut by someone else would then kill the process (SIGBUS).
    with path.open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), count, offset)
    if len(raw) != count:
        raise ValueError(f"ends at byte {offset + len(raw)}, {count - len(raw)} short")
    return raw


def _set_aside(path: Path, error: Exception) -> None:
    """Names the bad part in a warning and moves it out of the way of every later run."""
    log.warning("reference store: part %s skipped (%s); what it held is recomputed", path, error)
    if isinstance(error, OSError):
        return  # gone, or unreadable for now (permissions, a network disk): nothing says its bytes are bad
    with contextlib.suppress(OSError):  # another process was first, or the cache is read-only
        os.replace(path, path.with_name(path.name + _CORRUPT))
