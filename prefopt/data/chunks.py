"""A chunk of raw rows in, arrays of token ids out: the part of tokenisation that runs in any process."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from prefopt.data.formats import Reading, canonical
from prefopt.data.readers import RawRow
from prefopt.data.render import Rendered, Renderer, Request
from prefopt.data.rows import Refused, Reject, Row, row_id
from prefopt.data.samples import SampleReader, prompt_key

_IN_FLIGHT = 3
"""Chunks a worker process has waiting: enough never to idle, few enough to hold memory constant."""


@dataclass(frozen=True)
class Limits:
    """Longest prompt + response and longest prompt, in tokens; None does not bound."""

    max_length: int
    max_prompt: int | None = None


@dataclass(frozen=True)
class Chunk:
    """What became of a run of raw rows.

    ``lengths`` (n, 1 + K) counts the tokens of the prompt and of each response of the n rows kept;
    ``tokens`` (L,) int32 holds their ids in that order, row by row. ``loss_mask`` (L,) bool says which carry
    loss; ``whole`` is True where those are all of every response.
    """

    num_read: int
    ids: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    advantages: np.ndarray
    prompt_keys: np.ndarray
    loss_mask: np.ndarray
    whole: bool
    rejects: list[dict[str, Any]]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        labels = (self.scores, self.advantages, self.prompt_keys, self.loss_mask)
        return self.tokens, self.lengths, *labels


@dataclass(frozen=True)
class ChunkReader:
    """Canonicalises, renders and checks raw rows. Pickles, so that worker processes can have one.

    Attributes:
        readings: of a raw row each, in order: one, or two where a pair is read as two samples.
        samples: what makes samples of canonical rows, where they are samples.
    """

    renderer: Renderer
    readings: tuple[Reading, ...]
    limits: Limits
    samples: SampleReader | None = None

    def __call__(self, raw: Sequence[RawRow]) -> Chunk:
        """Raises: DataError, ModelError: what a row or the tokenizer cannot be read or rendered with."""
        sources = [(row, reading) for row in raw for reading in self.readings]
        rows = [self._read(row, reading) for row, reading in sources]
        requests = [
            Request(row.prompt, row.responses, row.ended, row.earlier, row.trained, row.options)
            for row in rows
            if isinstance(row, Row)
        ]
        rendered = iter(self.renderer.render_batch(requests))
        results = [next(rendered) if isinstance(row, Row) else row for row in rows]
        results = [
            check(result, self.limits, ended=isinstance(row, Refused) or row.ended)
            for result, row in zip(results, rows, strict=True)
        ]
        return self._pack(len(raw), sources, rows, results)

    def _read(self, raw: RawRow, reading: Reading) -> Row | Refused:
        row = canonical(raw, reading)
        if self.samples is None or reading.labels is None or isinstance(row, Refused):
            return row
        return self.samples(raw, row, reading.labels)

    def _pack(
        self,
        num_read: int,
        sources: Sequence[tuple[RawRow, Reading]],
        rows: Sequence[Row | Refused],
        results: Sequence[Rendered | Refused],
    ) -> Chunk:
        ids, kept, scores, advantages, keys, masks, rejects = [], [], [], [], [], [], []
        whole = True
        for (source, reading), row, result in zip(sources, rows, results, strict=True):
            name = _row_id(source, reading)
            if isinstance(result, Refused) or isinstance(row, Refused):
                rejects.append(_reject_line(name, source, result))
                continue
            ids.append(name)
            kept.append((result.prompt_ids, *result.responses))
            scores.append([np.nan if score is None else score for score in row.scores])
            advantages.append(np.nan if row.advantage is None else row.advantage)
            keys.append(_prompt_key(row, result.prompt_ids))
            masks.append(_loss_mask(result))
            # A source of dialogues has masks all the same, so that its rows keep the hash they had.
            whole = whole and not result.turns and reading.columns.turns == "last"
        parts = [part for row in kept for part in row]
        width = 3 if self.readings[0].pairs else 2
        return Chunk(
            num_read=num_read,
            ids=ids,
            tokens=np.array([token for part in parts for token in part], np.int32),
            lengths=np.array([len(part) for part in parts], np.int64).reshape(-1, width),
            scores=np.array(scores, np.float64).reshape(-1, width - 1),
            advantages=np.array(advantages if self.samples is not None else [], np.float64),
            prompt_keys=np.array(keys, np.uint64),
            loss_mask=np.concatenate([np.zeros(0, bool), *masks]),
            whole=whole,
            rejects=rejects,
        )


def _loss_mask(rendered: Rendered) -> np.ndarray:
    """(L,) bool of prompt and responses, True in the turns of a response that carry loss."""
    prompt, total = len(rendered.prompt_ids), sum(map(len, rendered.responses))
    mask = np.zeros(prompt + total, bool)
    for start, stop in rendered.turns or ((0, total),):
        mask[prompt + start : prompt + stop] = True
    return mask


def _row_id(row: RawRow, reading: Reading) -> str:
    name, side = reading.columns.id, reading.labels.side if reading.labels is not None else ""
    found = row_id(row, name)
    return f"{found}#{side}" if side else found


def check(result: Rendered | Refused, limits: Limits, *, ended: bool = True) -> Rendered | Refused:
    """``result``, or why its token ids must not reach a loss. ``ended``: responses have an end token."""
    if isinstance(result, Refused):
        return result
    prompt, responses = len(result.prompt_ids), [len(ids) for ids in result.responses]
    turns, reason = [stop - start for start, stop in result.turns], None
    shortest = min(turns or responses)
    if shortest < 1 + ended:  # a lone end token: the template has stripped all there was
        is_chosen = bool(turns) or responses[0] < 2
        reason = Reject.EMPTY_CHOSEN if is_chosen else Reject.EMPTY_REJECTED
    elif len(set(result.responses)) < len(responses):
        reason = Reject.IDENTICAL
    elif limits.max_prompt is not None and prompt > limits.max_prompt:
        reason = Reject.PROMPT_TOO_LONG
    elif prompt + max(responses) > limits.max_length:
        reason = Reject.TOO_LONG
    return result if reason is None else Refused(reason, lengths=(prompt, *responses))


def parallel_chunks(
    reader: ChunkReader, batches: Iterable[list[RawRow]], num_workers: int
) -> Iterator[Chunk]:
    """Chunks in the order of ``batches``, tokenised by ``num_workers`` processes.

    Spawned, not forked: a fork after the tokenizer's threads have started can deadlock.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (reader,))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= _IN_FLIGHT * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_READER: ChunkReader | None = None
"""The reader of this worker process: sent once, not with every chunk."""


def _start_worker(reader: ChunkReader) -> None:
    global _READER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _READER = reader


def _work(batch: list[RawRow]) -> Chunk:
    assert _READER is not None  # `_start_worker` ran first
    return _READER(batch)


def _prompt_key(row: Row, ids: tuple[int, ...]) -> int:
    """64 bits that are the same for the same prompt, in whatever source it stands and whatever reward is in it."""
    prompt = np.array(ids, np.int32).tobytes()
    if row.source_prompt is not None:
        prompt = prompt_key(row.source_prompt).encode()
    return int.from_bytes(blake2b(prompt, digest_size=8).digest(), "little")


def _reject_line(name: str, row: RawRow, result: Rendered | Refused) -> dict[str, Any]:
    assert isinstance(result, Refused)
    line: dict[str, Any] = {"id": name, "file": row.file, "row": row.number}
    line["reason"] = str(result.reason)
    if result.lengths is not None:
        names = ("prompt", "chosen", "rejected")
        line["lengths"] = dict(zip(names, result.lengths, strict=False))
    if result.detail is not None:
        line["detail"] = result.detail
    return line
