"""Files of a run, an evaluation and a build, read back: torn, edited or of another shape, they are a sentence."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines.folder import StageFolder
from eval.comparison.outputs import open_outputs
from eval.store import Store
from prefopt.commands.show_rollouts import find_batch
from prefopt.errors import PrefoptError
from prefopt.reference.store import ReferenceStore
from prefopt.rollouts.experience import ExperienceLog
from prefopt.storage.checksums import check_weights
from prefopt.storage.reading import sealed
from prefopt.storage.run_files import complete_checkpoints, read_metrics, read_run
from prefopt.training.integrity import read_state
from prefopt.training.metrics import MetricsLog
from prefopt.types import Group, Response
from tests.fuzz.mutations import as_json, fuzzed, mutated_bytes, mutated_value, steps
from tests.rollouts.test_experience import batch

RUN = {"recipe": {"stage": "preference", "model": {"path": "m", "revision": None}, "peft": None,
       "data": {"train": []}},
       "data": {"labels": {"rewards": {"min": 0, "max": 1}}}}  # fmt: skip
METRICS: list[Any] = [{"step": n, "loss/total": 0.5, "time/train_s": 1.0} for n in range(3)]
STATE = {
    "step": 3,
    "num_processes": 1,
    "regime": {"step": 3},
    "metrics": {"sums": {}},
    "files": {"a": "0-99"},
}
STORE: list[Any] = [{"basis": {"model": "m", "n": [1]}}, {"id": "x1", "v": 1}, {"id": "x2", "v": 2}]
DONE: dict[str, Any] = {"shards": [{"file": "00000.jsonl", "rows_out": 1, "sha256": "ab", "rows_in": 1,
        "dropped": {}}],
        "counts": {"rows_in": 1, "rows_out": 1, "dropped": {"a": 1}}}  # fmt: skip
RESULTS = {"format": 1, "model": {}, "tasks": {"gsm8k": {"version": 1, "kind": "x", "headline": "accuracy",
           "direction": "higher", "metrics": {"accuracy": {"value": 1.0, "stderr": 0.1, "interval": [0, 1]}},
           "counts": {"examples": 1}, "groups": {}, "notes": []}}}  # fmt: skip
SUMS = {"files": {"a.bin": "0-99aa06d3014798d86001c324468d497f"}}
GROUP = Group(id="g", prompt_ids=(1, 2, 3), responses=(Response(ids=(4, 5)), Response(ids=(6,))))
LOGPS = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]


def _written(write: Callable[[Path], Path]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder)).read_bytes()


def _rollouts(folder: Path) -> Path:
    log = ExperienceLog(folder, "a")
    for step in range(2):
        log.append(batch(step))
    return folder / "shard-00000.jsonl"


def _logps(folder: Path) -> Path:
    store = ReferenceStore(folder, "k" * 64)
    store.add([(GROUP, LOGPS)])
    part = store.flush()
    assert part is not None
    return part


def _as_lines(rows: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def _one(value: Any, *, seal: bool = False) -> st.SearchStrategy[bytes]:
    """A file that holds one object, mutated as text or as a value; sealed before, or all the same."""
    whole = sealed(value) if seal else value
    again = mutated_value([value]).map(_resealed if seal else as_json)
    return st.one_of(mutated_bytes([as_json(whole)]), mutated_value([whole]).map(as_json), again)


def _resealed(value: Any) -> bytes:
    try:
        return as_json(sealed(value))
    except (TypeError, ValueError):  # no object, or keys that have no order
        return as_json(value)


def _many(rows: list[Any]) -> st.SearchStrategy[bytes]:
    return st.one_of(
        mutated_bytes([_as_lines(rows)]),
        mutated_value([rows]).map(lambda found: _as_lines(list(found or []))),
    )


ROLLOUTS, PART = _written(_rollouts), _written(_logps)
FILES: dict[str, st.SearchStrategy[bytes]] = {
    "run": _one(RUN),
    "metrics": _many(METRICS),
    "state": _one(STATE, seal=True),
    "rollouts": st.one_of(
        mutated_bytes([ROLLOUTS]), _many([json.loads(row) for row in ROLLOUTS.splitlines()])
    ),
    "store": _many(STORE),
    "record": _one(DONE, seal=True),
    "shard": _one(DONE["shards"][0], seal=True),
    "results": _one(RESULTS),
    "sums": _one(SUMS, seal=True),
    "logps": mutated_bytes([PART]),
}


def read_run_file(folder: Path, data: bytes) -> None:
    (folder / "run.json").write_bytes(data)
    read_run(folder)


def read_metrics_file(folder: Path, data: bytes) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    try:
        read_metrics(path)
    finally:
        MetricsLog(path).rewind(1)
        read_metrics(path)


def read_checkpoint(folder: Path, data: bytes) -> None:
    step = folder / "step-3"
    for name in ("step-3", "step-3.bak", "step-x"):
        (folder / name).mkdir()
        (folder / name / "prefopt.json").write_bytes(data)
    assert complete_checkpoints(folder) == {3: step}
    read_state(step)


def read_rollouts(folder: Path, data: bytes) -> None:
    log_folder = folder / "rollouts" / "rank-00000"
    log_folder.mkdir(parents=True)
    (log_folder / "shard-00000.jsonl").write_bytes(data)
    log = ExperienceLog(log_folder, "a")
    for step in range(3):
        try:
            log.get(step)
        except PrefoptError:
            continue
    log.append(batch(7))
    assert ExperienceLog(log_folder, "a").get(7) == batch(7)
    find_batch(folder, None)


def read_store(folder: Path, data: bytes) -> None:
    path, basis = folder / "s.jsonl", {"model": "m", "n": [1]}
    path.write_bytes(data)
    with Store(path, basis) as store:
        store.add([{"id": "new", "v": 1}])
    with Store(path, basis) as store:
        assert "new" in store


def read_stage(folder: Path, data: bytes) -> None:
    stage = StageFolder(folder, "s")
    stage.records.mkdir(parents=True)
    stage.done_record.write_bytes(data)
    done = stage.done()
    assert done is not None
    stage.output(done)


def read_shard_record(folder: Path, data: bytes) -> None:
    stage = StageFolder(folder, "s")
    stage.records.mkdir(parents=True)
    stage.shard_record(0).write_bytes(data)
    assert stage.made(0) is not None


def read_results(folder: Path, data: bytes) -> None:
    paths = [folder / "a", folder / "b"]
    for path, text in zip(paths, (data, ORIGINALS["results"]), strict=True):
        path.mkdir()
        (path / "results.json").write_bytes(text)
    open_outputs(paths)


def read_sums(folder: Path, data: bytes) -> None:
    (folder / "prefopt_files.json").write_bytes(data)
    check_weights(folder)


def read_logps(folder: Path, data: bytes) -> None:
    part = _logps(folder)
    part.write_bytes(data)
    found = ReferenceStore(folder, "k" * 64).get(GROUP)
    assert found is None or [each.tolist() for each in found] == [each.tolist() for each in LOGPS]


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "run": read_run_file,
    "metrics": read_metrics_file,
    "state": read_checkpoint,
    "rollouts": read_rollouts,
    "store": read_store,
    "record": read_stage,
    "shard": read_shard_record,
    "results": read_results,
    "sums": read_sums,
    "logps": read_logps,
}


def check(folder: Path, case: tuple[str, bytes]) -> None:
    kind, data = case
    own = folder / "files"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    try:
        with steps():
            READERS[kind](own, data)
    except PrefoptError as error:
        str(error).encode()


CASE = st.sampled_from(sorted(FILES)).flatmap(lambda kind: st.tuples(st.just(kind), FILES[kind]))
ORIGINALS = {
    "run": as_json(RUN),
    "metrics": _as_lines(METRICS),
    "state": as_json(sealed(STATE)),
    "rollouts": ROLLOUTS,
    "store": _as_lines(STORE),
    "record": as_json(sealed(DONE)),
    "shard": as_json(sealed(DONE["shards"][0])),
    "results": as_json(RESULTS),
    "sums": as_json(sealed({"files": {}})),
    "logps": PART,
}


@pytest.mark.parametrize("kind", sorted(READERS))
def test_the_files_that_are_mutated_are_right(tmp_path: Path, kind: str) -> None:
    READERS[kind](tmp_path, ORIGINALS[kind])


test_files, test_many_files = fuzzed(CASE, check)
