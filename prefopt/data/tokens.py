"""Tokenised rows: flat arrays on disk, memory-mapped, and the indexable set a regime draws from.

A store holds one source: the ids of every row one after the other (prompt, then its responses), with
lengths beside them. A set is an ordered choice of rows from stores: a mixture, a split, an epoch's draw.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from prefopt.errors import DataError
from prefopt.storage.reading import UnreadableError, load_json
from prefopt.types import Group, Response

TOKENS, LENGTHS, SCORES, ADVANTAGES, PROMPTS, LOSS_MASK, IDS = (
    "tokens.i4",
    "lengths.i8",
    "scores.f8",
    "advantages.f8",
    "prompts.u8",
    "loss_mask.u1",
    "ids.txt",
)
CONTENT = (TOKENS, LENGTHS, SCORES, ADVANTAGES, PROMPTS, LOSS_MASK, IDS)
"""What the fingerprint of a store covers."""
_OPTIONAL = (ADVANTAGES, LOSS_MASK)
"""Of these, what is empty where no row has any of it."""
REJECTS, META = "rejects.jsonl", "meta.json"


@dataclass(frozen=True)
class TokenStore:
    """Tokenised rows of one source, read from a cache directory.

    Attributes:
        directory: where its files lie.
        fingerprint: SHA-256 of token ids, lengths, scores, advantages, loss masks and row ids.
        tokens: (L,) int32, all rows one after the other; memory-mapped.
        lengths: (n, 1 + K) int64 tokens of the prompt and of each of the K responses.
        scores: (n, K) float64, NaN where a response has none.
        advantages: (n,) float64 of the rows that are samples, NaN where there is none.
        prompt_keys: (n,) uint64 hash of the prompt's ids.
        loss_mask: (L,) bool, which of ``tokens`` carry loss; empty where every response token does.
        ids: the n row ids.
        reject_counts: refused rows by reason.
    """

    directory: Path
    fingerprint: str
    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    advantages: np.ndarray
    prompt_keys: np.ndarray
    loss_mask: np.ndarray
    ids: tuple[str, ...]
    reject_counts: Mapping[str, int]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The store in ``directory``, its bytes checked against their hashes.

        Raises: FileNotFoundError if there is none; ValueError if it is not what was written.
        """
        meta = _read_meta(directory)
        if contents_sha256(directory) != meta["files"]:
            raise ValueError(f"{directory}: contents do not match their hashes")
        rows, responses = meta["rows"], meta["responses"]
        lengths = np.fromfile(directory / LENGTHS, np.int64).reshape(rows, 1 + responses)
        return cls(
            directory=directory,
            fingerprint=fingerprint(meta["files"]),
            tokens=np.memmap(directory / TOKENS, np.int32, mode="r"),
            lengths=lengths,
            scores=np.fromfile(directory / SCORES, np.float64).reshape(rows, responses),
            advantages=_advantages(directory, rows),
            prompt_keys=np.fromfile(directory / PROMPTS, np.uint64),
            loss_mask=_loss_mask(directory),
            ids=tuple(json.loads((directory / IDS).read_text("utf-8"))),
            reject_counts=meta["rejects"],
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """(n,) index into ``tokens`` at which each row begins."""
        return np.concatenate([[0], self.lengths.sum(1).cumsum()[:-1]])

    @property
    def last_ids(self) -> np.ndarray:
        """The different ids that responses end with."""
        ends = self.lengths.cumsum().reshape(self.lengths.shape)[:, 1:]
        return np.unique(self.tokens[ends.ravel() - 1])

    @cached_property
    def num_loss_tokens(self) -> np.ndarray:
        """(n, K) int64 tokens of each response that carry loss."""
        if not len(self.loss_mask):
            return self.lengths[:, 1:]
        ends = self.lengths.cumsum().reshape(self.lengths.shape)
        # Of an empty part reduceat takes one value all the same: of prompts, which are not asked for.
        starts = (ends - self.lengths).ravel()
        counts = np.add.reduceat(self.loss_mask, starts, dtype=np.int64)
        return counts.reshape(self.lengths.shape)[:, 1:]

    def group(self, row: int) -> Group:
        start, lengths = int(self.starts[row]), self.lengths[row]
        # A copy, once a row: what happens to the file later does not reach groups that were read.
        ids = np.array(self.tokens[start : start + int(lengths.sum())])
        ends = lengths.cumsum().tolist()
        scores = [None if np.isnan(score) else float(score) for score in self.scores[row]]
        advantage = None if np.isnan(self.advantages[row]) else float(self.advantages[row])
        mask = np.array(self.loss_mask[start : start + len(ids)]) if len(self.loss_mask) else None
        responses = [
            Response(
                ids[begin:end],
                score,
                advantage=advantage,
                loss_mask=None if mask is None else mask[begin:end],
            )
            for begin, end, score in zip(ends, ends[1:], scores, strict=False)
        ]
        pairs, source_row = pairs_among(len(responses)), (self.fingerprint, row)
        return Group(self.ids[row], ids[: ends[0]], tuple(responses), pairs, source_row)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Refused rows: id, file, row, reason, lengths, detail."""
        with (self.directory / REJECTS).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class TokenSet:
    """An ordered choice of rows from token stores; a row may occur more than once.

    Args:
        stores: where rows come from; all hold the same number of responses a row.
        rows: for each store, the row numbers taken from it, in order.
        names: what each store is called; default: its number.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        rows: Sequence[np.ndarray],
        names: Sequence[str] | None = None,
    ) -> None:
        self.stores = tuple(stores)
        self.names = tuple(names or map(str, range(len(stores))))
        self._rows = tuple(np.asarray(chosen, np.int64) for chosen in rows)
        self._ends = np.cumsum([len(chosen) for chosen in self._rows])
        lengths = self._gather("lengths")
        self.prompt_lengths: np.ndarray = lengths[:, 0]
        """(n,) tokens of each prompt."""
        self.response_lengths: np.ndarray = lengths[:, 1:]
        """(n, K) tokens of each response."""
        self.num_loss_tokens: np.ndarray = self._gather("num_loss_tokens")
        """(n, K) tokens of each response that carry loss."""
        self.num_tokens: np.ndarray = lengths.sum(1)
        """(n,) tokens of each row with its prompt taken once."""
        self.prompt_keys: np.ndarray = self._gather("prompt_keys")
        """(n,) hash of each prompt's ids."""
        self.rewards: np.ndarray = self._gather("scores")[:, 0]
        """(n,) score of each row's first response, NaN where it has none."""
        self.advantages: np.ndarray = self._gather("advantages")
        """(n,) advantage of each sample, NaN where it has none."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def group(self, index: int) -> Group:
        """The group at ``index``; a pair's chosen is response 0. IndexError outside the set."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a set of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part]) - len(self._rows[part])
        return self.stores[part].group(int(self._rows[part][index - start]))

    def pairs(self, index: int) -> tuple[tuple[int, int], ...]:
        """As of the group at ``index``."""
        return pairs_among(self.response_lengths.shape[1])

    def samples(self, index: int) -> tuple[bool, ...]:
        """As of the group at ``index``: all of a row that is no pair."""
        return (not self.pairs(index),) * self.response_lengths.shape[1]

    @property
    def parts(self) -> list[tuple[str, range]]:
        """The places of each store's rows, under its name; a store without rows has no part."""
        starts = [0, *self._ends.tolist()]
        spans = zip(self.names, starts, self._ends.tolist(), strict=False)
        return [(name, range(start, end)) for name, start, end in spans if end > start]

    def __iter__(self) -> Iterator[Group]:
        return map(self.group, range(len(self)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows and their order: the same one means the same data."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for store, rows in zip(self.stores, self._rows, strict=True):
            digest.update(f"{store.fingerprint}:{len(rows)}:".encode() + rows.tobytes())
        return digest.hexdigest()

    @property
    def reject_counts(self) -> dict[str, int]:
        """Refused rows by reason, over all stores, each counted once."""
        return count_rejects(self.stores)

    def take(self, indices: np.ndarray) -> TokenSet:
        """The rows at ``indices`` of this set, kept in this set's order."""
        chosen = np.sort(np.asarray(indices, np.int64))
        starts = self._ends - [len(rows) for rows in self._rows]
        parts = [
            rows[chosen[(chosen >= start) & (chosen < end)] - start]
            for rows, start, end in zip(self._rows, starts, self._ends, strict=True)
        ]
        return TokenSet(self.stores, parts, self.names)

    def _gather(self, name: str) -> np.ndarray:
        parts = [
            getattr(store, name)[rows] for store, rows in zip(self.stores, self._rows, strict=True)
        ]
        return np.concatenate(parts)


def pairs_among(num_responses: int) -> tuple[tuple[int, int], ...]:
    """The pairs of a tokenised row: two responses are chosen and rejected, one is a sample."""
    return ((0, 1),) if num_responses == 2 else ()


def count_rejects(stores: Sequence[TokenStore]) -> dict[str, int]:
    """Refused rows by reason; a store that occurs twice counts once."""
    total: Counter[str] = Counter()
    for store in {store.directory: store for store in stores}.values():
        total.update(store.reject_counts)
    return dict(total)


def contents_sha256(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a store except its own record. Raises: FileNotFoundError."""
    digests = {}
    for name in (*CONTENT, REJECTS):
        with (directory / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def fingerprint(digests: Mapping[str, str]) -> str:
    """The content hash of a store from those of its files; what was refused is no part of it.

    Rows that are no samples have an empty file of advantages, which is left out: pairs keep the hash they had, and
    with it runs that were started before there were samples can go on. So it is with loss masks.
    """
    names = [name for name in CONTENT if name not in _OPTIONAL or digests[name] != _OF_NOTHING]
    return hashlib.sha256("".join(digests[name] for name in names).encode()).hexdigest()


_OF_NOTHING = hashlib.sha256().hexdigest()


def _advantages(directory: Path, rows: int) -> np.ndarray:
    found = np.fromfile(directory / ADVANTAGES, np.float64)
    return found if len(found) else np.full(rows, np.nan)


def _loss_mask(directory: Path) -> np.ndarray:
    path = directory / LOSS_MASK
    return np.memmap(path, bool, mode="r") if path.stat().st_size else np.zeros(0, bool)


def _read_meta(directory: Path) -> dict[str, Any]:
    keys = {"rows": int, "responses": int, "files": dict, "rejects": dict}
    try:
        return load_json(directory / META, keys)
    except UnreadableError as error:
        raise ValueError(f"{directory / META}: unreadable: {error}") from error


def require_rows(num_rows: int, what: str, counts: Mapping[str, int], hint: str = "") -> None:
    """Raises DataError with the counts by reason if there are no rows."""
    if num_rows == 0:
        said = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        raise DataError(
            f"{what}: no row is left ({f'rejected: {said}' if said else 'no rows'}).{hint}"
        )
