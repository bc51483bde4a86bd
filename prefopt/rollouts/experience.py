"""The experience log: every rollout is on disk before it is trained on, and found again after a kill.

Append-only shards of JSON lines, one line a group and a commit line a batch. A batch counts once its commit
line is there; what a kill cut short is dropped when the log is opened, and said. A commit line holds a hash of the
batch, so that an edited one is noticed. Token ids and log-probs are base64
of little-endian int32 and float32 (exact, and an eighth of the space); texts and scores are readable.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from prefopt.engines.base import Completion
from prefopt.engines.probe import Gap
from prefopt.errors import TrainingError
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.rollouts.plan import Start
from prefopt.storage.packed import pack_floats, pack_ids, unpack_floats, unpack_ids
from prefopt.storage.reading import (
    LogLine,
    UnreadableError,
    as_object,
    log_lines,
    log_rows,
    parse_json,
    reading,
)

logger = logging.getLogger(__name__)

DIRECTORY = "rollouts"
_SHARD_BYTES = 64 * 2**20
_SHARD = re.compile(r"shard-\d{5,}\.jsonl")
_RANK = re.compile(r"rank-(\d+)")
_HASH = "xxh3"
_COMMIT = {"commit": int, "version": int, "groups": int, "lineage": str}
_ADVICE = "Restore the file, or move it away: the batches it held are sampled again"


class ExperienceLog:
    """The batches of one process.

    Args:
        directory: of this process alone.
        lineage: hash of whatever decides what a batch is (data, sampling, training settings). A batch of
            another lineage stays on disk and is not found again.
    """

    def __init__(self, directory: Path, lineage: str) -> None:
        self.directory = directory
        self.lineage = lineage
        self._found: dict[int, tuple[Path, int, int]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for shard in _shards(directory):
            self._open(shard)

    def __contains__(self, step: int) -> bool:
        return step in self._found

    def get(self, step: int) -> RolloutBatch | None:
        """The batch of ``step`` as it was logged last, or None. Raises: TrainingError if it is damaged."""
        if step not in self._found:
            return None
        path, start, end = self._found[step]
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read(end - start).splitlines()
        with reading(path, f"what was sampled for step {step + 1}", _ADVICE, TrainingError):
            return read_batch([*map(parse_json, lines)])

    def append(self, batch: RolloutBatch) -> None:
        """Writes a batch, flushed to disk. Raises: TrainingError if it cannot be written."""
        commit = {
            "commit": batch.step,
            "version": batch.version,
            "groups": len(batch.groups),
            "lineage": self.lineage,
            "timings": dict(batch.timings),
            "reports": dict(batch.reports),
            "gap": None if batch.gap is None else [batch.gap.mean, batch.gap.max],
        }
        groups = [*map(_group_row, batch.groups)]
        rows = [*groups, {**commit, _HASH: _hash([*groups, commit])}]
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = self._current()
        try:
            with path.open("ab") as file:
                start = file.tell()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written: {error}. Nothing is trained on before it is logged: free space "
                "and run the same command, it goes on from the newest checkpoint"
            ) from error
        self._found[batch.step] = (path, start, start + len(data))

    def _current(self) -> Path:
        shards = _shards(self.directory)
        if shards and shards[-1].stat().st_size < _SHARD_BYTES:
            return shards[-1]
        return self.directory / f"shard-{len(shards):05d}.jsonl"

    def _open(self, shard: Path) -> None:
        """Indexes a shard, and cuts what follows its last commit: a batch that a kill left half written."""
        start = end = 0
        with reading(shard, "an experience log", _ADVICE, TrainingError):
            for line in log_lines(shard):
                commit = _commit(line)
                if commit is not None:
                    if commit["lineage"] == self.lineage:
                        self._found[commit["commit"]] = (shard, start, line.end)
                    start = end = line.end
            size = shard.stat().st_size
            if end < size:
                os.truncate(shard, end)
                logger.warning(
                    "%s: its last %s bytes are of a batch that was cut off by a kill or a power cut: it is "
                    "sampled again", shard, f"{size - end:,}",
                )  # fmt: skip


def read_log(run_dir: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """``(commit, groups)`` rows of every committed batch, rank by rank in the order they were written.

    ``commit["rank"]`` says whose it is. A step that was sampled anew after a kill is there twice.
    Raises: DataError naming file and line of what is no row.
    """
    for rank, directory in rank_directories(run_dir):
        for shard in _shards(directory):
            rows: list[dict[str, Any]] = []
            for row in log_rows(shard, {}, _ADVICE):
                if "commit" not in row:
                    rows.append(row)
                    continue
                with reading(shard, "an experience log", _ADVICE):
                    commit = as_object(row, _COMMIT)
                yield {**commit, "rank": rank}, rows
                rows = []


def rank_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """The processes that sampled in a run, and where each kept its log."""
    found = [(_RANK.fullmatch(path.name), path) for path in (run_dir / DIRECTORY).glob("rank-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _shards(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if _SHARD.fullmatch(path.name))


def _commit(line: LogLine) -> dict[str, Any] | None:
    """The commit row of a line, None for a group's."""
    if not line.data.startswith(b'{"commit"'):
        return None
    try:
        return line.row(_COMMIT)
    except UnreadableError as error:
        raise UnreadableError(f"its line {line.number}: {error}") from error


def _hash(rows: Sequence[Any]) -> str:
    """Of a batch's rows, which is the same for what was written and what is read."""
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, sort_keys=True).encode())


def _group_row(group: RolloutGroup) -> dict[str, Any]:
    start = group.start
    return {
        "id": group.prompt_id,
        "place": start.place,
        "row": start.row,
        "prompt_ids": pack_ids(group.prompt_ids),
        "prefix_tokens": len(start.prefix),
        "responses": [
            {
                "text": text,
                "ids": pack_ids(completion.ids),
                "logps": pack_floats(completion.logps),
                "stop_reason": completion.stop_reason,
                "seed": seed,
            }
            for text, completion, seed in zip(
                group.texts, group.completions, start.seeds, strict=False
            )
        ],
        "offline_ids": None if group.offline_ids is None else pack_ids(group.offline_ids),
        "rewards": group.rewards,
        "parts": dict(group.parts),
        "pairs": group.pairs,
        "advantages": group.advantages,
        "skipped": group.skipped,
        "failed": group.failed,
    }


def read_batch(rows: list[dict[str, Any]]) -> RolloutBatch:
    """The batch that ``rows`` are of: its groups, then its commit."""
    *groups, commit = (as_object(row) for row in rows)
    told = commit.pop(_HASH, None)  # logs of versions before have none
    if told is not None and told != _hash([*groups, commit]):
        raise UnreadableError(f"the batch of step {commit['commit'] + 1} was edited or damaged")
    if len(groups) != commit["groups"]:
        raise ValueError(f"{len(groups)} groups where {commit['groups']} were written")
    return RolloutBatch(
        step=commit["commit"],
        version=commit["version"],
        groups=tuple(map(_read_group, groups)),
        timings={name: float(seconds) for name, seconds in commit["timings"].items()},
        reports={name: float(value) for name, value in commit["reports"].items()},
        gap=None if commit["gap"] is None else Gap(*commit["gap"]),
    )


def _read_group(row: dict[str, Any]) -> RolloutGroup:
    responses = row["responses"]
    prompt_ids = unpack_ids(row["prompt_ids"])
    prefix = prompt_ids[len(prompt_ids) - row["prefix_tokens"] :]
    return RolloutGroup(
        start=Start(row["place"], row["row"], prefix, tuple(r["seed"] for r in responses)),
        prompt_id=row["id"],
        prompt_ids=prompt_ids,
        completions=tuple(
            Completion(unpack_ids(r["ids"]), unpack_floats(r["logps"]), r["stop_reason"])
            for r in responses
        ),
        texts=tuple(r["text"] for r in responses),
        rewards=None if row["rewards"] is None else tuple(map(float, row["rewards"])),
        parts={name: tuple(values) for name, values in row["parts"].items()},
        offline_ids=None if row["offline_ids"] is None else unpack_ids(row["offline_ids"]),
        pairs=tuple((chosen, rejected) for chosen, rejected in row["pairs"]),
        advantages=None if row["advantages"] is None else tuple(row["advantages"]),
        skipped=row["skipped"],
        failed=row["failed"],
    )
