"""From the rows of one source to a token store: read, canonicalise, render, check, write, cache.

Needs no process group. Processes that ask for one store at the same time get one build: the first takes
a file lock, the others wait and read. Memory is constant: rows pass through in chunks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from prefopt.data.chunks import Chunk, ChunkReader, Limits, parallel_chunks
from prefopt.data.formats import Reading, resolve, unread_columns
from prefopt.data.readers import RawRow
from prefopt.data.render import RENDERER_VERSION, Renderer
from prefopt.data.rows import Reject
from prefopt.data.samples import SampleNeeds, SampleReader, Scaling, resolve_samples
from prefopt.data.sources import Source, first_rows, open_source
from prefopt.data.tokens import (
    ADVANTAGES,
    IDS,
    LENGTHS,
    LOSS_MASK,
    META,
    PROMPTS,
    REJECTS,
    SCORES,
    TOKENS,
    TokenStore,
    contents_sha256,
    require_rows,
)
from prefopt.errors import DataError
from prefopt.recipe.schema import DataSection, SourceSection
from prefopt.report.bars import Bar
from prefopt.storage.cache import atomic_directory, cache_root

log = logging.getLogger(__name__)

STORE_VERSION = 4
"""Raise whenever the files of a store change shape, or rows are refused differently."""

_CHUNK_ROWS = 256


def tokenise_source(
    section: SourceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool,
    samples: tuple[SampleNeeds, Scaling] | None = None,
) -> TokenStore:
    """The token store of one source: from the cache if these rows were tokenised like this before.

    Args:
        pairs: read pairs, and not one response a row.
        samples: read weighted samples: what the run needs of them, and how their rewards are scaled.

    Raises: ConfigError, DataError, ModelError: whatever the rows, the settings or the tokenizer lack.
    """
    source = open_source(section)
    first = next(first_rows(source, 1), None)
    if first is None:
        raise DataError(f"data: {section.path}: holds no rows")
    limits = Limits(data.max_length_tokens, data.max_prompt_tokens)
    if samples is None:
        job = _Job(section, source, (resolve(section, first, pairs=pairs),), limits)
    else:
        needs, scaling = samples
        template = None if needs.condition is None else needs.condition.template
        reader = SampleReader(scaling, template)
        job = _Job(section, source, resolve_samples(section, first, needs), limits, reader)
    kept = section.control_tokens
    Renderer(tokenizer).controls.require_known(kept, f"data: {section.path}: ")
    _mention_format(job, tokenizer)
    unread = unread_columns(first, job.readings)
    if unread:
        log.info("%s: columns that nothing reads: %s", section.path, ", ".join(unread))
    if "system" in unread and job.readings[0].format != "text":
        log.warning(
            "%s: the column 'system' is left out of every prompt; if it holds system messages, set "
            "columns.system: system", section.path,
        )  # fmt: skip
    directory = cache_root(data.cache_dir) / "tokens" / job.key(tokenizer)
    try:
        store = _cached(directory) or _build_locked(directory, job, tokenizer, data.num_workers)
    except OSError as error:
        raise DataError(
            f"tokenised data cannot be cached in {directory.parent}: {error.strerror or error}; "
            "set data.cache_dir to a directory with room that you may write to"
        ) from error
    _report(section.path, store)
    return store


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything about a tokenizer that decides token ids, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left behind by earlier calls with truncation or padding; every call here overrides them.
        core: Any = {**state, "truncation": None, "padding": None}
    else:
        core = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    special = {str(id_): repr(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    template, names = tokenizer.chat_template, tokenizer.special_tokens_map
    parts = [core, special, template, {k: str(v) for k, v in names.items()}]
    return _sha256(parts)


@dataclass(frozen=True)
class _Job:
    """One source and how it is to be read."""

    section: SourceSection
    source: Source
    readings: tuple[Reading, ...]
    limits: Limits
    samples: SampleReader | None = None

    def key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Hash of everything that decides the contents of the store."""
        reading, samples = self.readings[0], self.samples
        return _sha256(
            {
                "versions": [STORE_VERSION, RENDERER_VERSION],
                "libraries": [version("tokenizers"), version("transformers")],
                "source": self.source.identity(),
                "max_rows": self.section.max_rows,
                "format": reading.format,
                "columns": reading.columns.model_dump(),
                "pairs": reading.pairs,
                "drop_ties": reading.drop_ties,
                "rules": [reading.rules.omits, reading.rules.control_tokens],
                "labels": [repr(reading.labels) for reading in self.readings],
                "samples": None if samples is None else [samples.scaling.digest, samples.template],
                "limits": [self.limits.max_length, self.limits.max_prompt],
                "tokenizer": tokenizer_hash(tokenizer),
            }
        )


def _cached(directory: Path) -> TokenStore | None:
    try:
        return TokenStore.read(directory)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("tokenised data in the cache is damaged and is made anew: %s", error)
        return None


def _build_locked(
    directory: Path, job: _Job, tokenizer: PreTrainedTokenizerBase, num_workers: int
) -> TokenStore:
    """Builds the store, or waits for the process that does; the system frees a killed process's lock."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        log.info("%s: another process is tokenising it; waiting", job.section.path)
        lock.acquire()
    try:
        store = _cached(directory)  # the process that held the lock before has made it
        if store is None:
            with atomic_directory(directory) as temporary:
                _write_store(temporary, _chunks(job, tokenizer, num_workers), job)
            store = TokenStore.read(directory)
        return store
    finally:
        lock.release()


def _chunks(job: _Job, tokenizer: PreTrainedTokenizerBase, num_workers: int) -> Iterator[Chunk]:
    """Tokenised chunks in row order, with a progress bar on stderr once it takes over two seconds."""
    reader = ChunkReader(Renderer(tokenizer), job.readings, job.limits, job.samples)
    rows = _batched(first_rows(job.source, job.section.max_rows), _CHUNK_ROWS)
    chunks = map(reader, rows) if num_workers == 1 else parallel_chunks(reader, rows, num_workers)
    total = job.source.num_rows()
    if total is not None and job.section.max_rows is not None:
        total = min(total, job.section.max_rows)
    name = f"tokenising {Path(job.section.path).name}"
    with Bar(desc=name, total=total, unit=" rows", delay=2, dynamic_ncols=True) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk.num_read)


def _batched(rows: Iterable[RawRow], size: int) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_store(directory: Path, chunks: Iterable[Chunk], job: _Job) -> None:
    """Appends chunks to the files of a store. Raises: DataError if no row survives."""
    ids: list[str] = []
    counts: dict[str, int] = {}
    arrays = (TOKENS, LENGTHS, SCORES, ADVANTAGES, PROMPTS, LOSS_MASK)
    files = {name: (directory / name).open("wb") for name in arrays}
    whole = True
    try:
        with (directory / REJECTS).open("w", encoding="utf-8") as rejects:
            for chunk in chunks:
                for name, array in zip(files, chunk.arrays, strict=True):
                    array.tofile(files[name])
                ids += chunk.ids
                whole = whole and chunk.whole
                for reject in chunk.rejects:
                    counts[reject["reason"]] = counts.get(reject["reason"], 0) + 1
                    rejects.write(json.dumps(reject, ensure_ascii=False) + "\n")
    finally:
        if whole:  # every response token carries loss: nothing to say
            files[LOSS_MASK].truncate(0)
        for file in files.values():
            file.close()
    require_rows(len(ids), f"data: {job.section.path}", counts, _hint(directory, counts))
    (directory / IDS).write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    responses = 2 if job.readings[0].pairs else 1
    meta: dict[str, Any] = {"rows": len(ids), "responses": responses, "rejects": counts}
    meta["files"] = contents_sha256(directory)
    (directory / META).write_text(json.dumps(meta, indent=1), "utf-8")


_HINTS: dict[str, str] = {
    Reject.BROKEN_TEXT: "the rows' text was cut within a character; make it again with whole characters",
    Reject.TOO_LONG: "raise data.max_length_tokens",
    Reject.PROMPT_TOO_LONG: "raise data.max_prompt_tokens",
    Reject.PROMPT_NOT_PREFIX: (
        "the prompt alone is tokenised otherwise than at the start of prompt + response: give plain text "
        "a clear boundary (end the prompt with a line break, not a space), or choose a chat template that "
        "renders earlier turns as it renders the generation prompt"
    ),
    Reject.TURN_NOT_PREFIX: (
        "the chat template renders an earlier turn of the assistant otherwise than a last one, or ends it with no "
        "token of its own: set model.chat_template to one that renders every turn alike, or columns.turns: last"
    ),
    Reject.NOT_RENDERED: (
        "the chat template leaves out what these rows say: set model.chat_template to one that renders it, leave "
        "the column out (columns.tools: null, …), or, where it is meant, set template_omits on the source"
    ),
    Reject.CONTROL_TOKEN: (
        "their texts spell out control tokens of the tokenizer: take them out; where the text is rendered already "
        "or they are meant, name them under control_tokens on the source"
    ),
    Reject.NO_LOSS: "their messages say that no turn carries loss (weight, train)",
    Reject.TEMPLATE_REFUSED: "the chat template does not take these dialogues; set model.chat_template",
    Reject.PROMPT_ANSWERED: "the prompt ends with a turn of the assistant, and both sides begin with one: leave "
    "that turn out of the prompt, or put its text before that of each side",
    Reject.PROMPTS_DIFFER: "map columns.prompt to the column that both sides answer",
    Reject.NOT_ASSISTANT: "each side must end with the assistant's turn",
    Reject.IDENTICAL: "both sides are the same; check columns.chosen and columns.rejected",
}
_NOTABLE_FRAC = 0.05
"""Share of rows lost to one reason from which a warning says what can be done about it."""


def _hint(directory: Path, counts: dict[str, int]) -> str:
    """What to do about the most frequent reason, with the first row it struck."""
    if not counts:
        return ""
    reason = max(counts, key=lambda name: counts[name])
    with (directory / REJECTS).open(encoding="utf-8") as lines:
        first = next(line for line in map(json.loads, lines) if line["reason"] == reason)
    found = first.get("detail") or first.get("lengths") or "see its text"
    advice = _HINTS.get(reason, "check the column map")
    return f" Most are {reason}: {advice} (first: {first['file']}:{first['row']}, {found})"


def _report(path: str, store: TokenStore) -> None:
    """Logs what was kept and refused; warns where one reason takes a notable share of the rows."""
    lost = sum(store.reject_counts.values())
    log.info("%s: %d rows, %d rejected %s", path, len(store), lost, dict(store.reject_counts) or "")
    for reason, count in store.reject_counts.items():
        frac = count / (len(store) + lost)
        hint = _HINTS.get(reason)
        if frac >= _NOTABLE_FRAC and hint:
            log.warning(
                "%s: %d rows (%.0f%%) rejected as %s: %s", path, count, 100 * frac, reason, hint
            )


def _mention_format(job: _Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where `auto` read plain strings and an instruct tokenizer would have templated them as chat."""
    if job.section.format != "auto":
        return
    log.info("%s: read as format %s", job.section.path, job.readings[0].format)
    if job.readings[0].format == "text" and tokenizer.chat_template is not None:
        log.warning(
            "%s holds plain strings, read as format: text (no chat template); for a chat model set "
            "format: chat, to keep plain text and silence this set format: text",
            job.section.path,
        )


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
