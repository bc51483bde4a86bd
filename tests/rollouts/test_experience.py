"""The experience log gives back what was written, whatever a kill left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefopt.engines.base import Completion
from prefopt.engines.probe import Gap
from prefopt.errors import TrainingError
from prefopt.rollouts import experience
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.rollouts.experience import ExperienceLog, read_log
from prefopt.rollouts.plan import Start


def batch(step: int, num_groups: int = 2) -> RolloutBatch:
    """A batch with every field set, and floats that only exact storage gives back."""
    rng = np.random.default_rng(step)

    def completion() -> Completion:
        logps = tuple(np.log(rng.random(5)).astype(np.float32).astype(float).tolist())
        return Completion((7, 8, 9, 10, 2), logps, "eos")

    groups = tuple(
        RolloutGroup(
            start=Start(place, 3 * place, prefix=(5, 6)[:place], seeds=(2**61 + place, step)),
            prompt_id=f"ünïcode {place}",
            prompt_ids=(1, 4, 5, 6)[: 3 + place],
            completions=(completion(), completion()),
            texts=('with "quotes"\nand lines', ""),
            rewards=(0.1 + 0.2, -1 / 3, 1.0),
            parts={"math": (1.0, 0.0, 1.0)},
            offline_ids=(9, 2),
            pairs=((0, 1), (2, 1)),
            advantages=(0.1, -0.1),
            skipped="tie" if place else None,
            failed=None,
        )
        for place in range(num_groups)
    )
    # The rolled-in prefix is the end of what was continued.
    groups = tuple(g if not g.start.prefix else _ending_in_prefix(g) for g in groups)
    timings = {"generate_s": 0.25, "score_s": 1e-3}
    reports = {"judge/consistency_rate": 1 / 7}
    gap = Gap(1 / 3, 2.5) if step % 2 else None
    return RolloutBatch(step, step // 2, groups, timings, reports, gap)


def _ending_in_prefix(group: RolloutGroup) -> RolloutGroup:
    return replace(group, prompt_ids=(1, 4, *group.start.prefix))


def test_batches_come_back_exactly(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path, "a")
    for step in range(4):
        log.append(batch(step))
    for reader in (log, ExperienceLog(tmp_path, "a")):
        assert [reader.get(step) for step in range(4)] == [batch(step) for step in range(4)]
        assert reader.get(4) is None


def test_whatever_a_kill_cuts_off_is_the_last_batch_only(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path / "whole", "a")
    log.append(batch(0))
    (shard,) = (tmp_path / "whole").iterdir()
    first = shard.stat().st_size
    log.append(batch(1))
    data = shard.read_bytes()
    for size in sorted({*range(first, len(data), 97), len(data) - 1}):
        directory = tmp_path / f"cut-{size}"
        directory.mkdir()
        (directory / shard.name).write_bytes(data[:size])
        cut = ExperienceLog(directory, "a")
        assert cut.get(0) == batch(0)
        assert cut.get(1) is None
        cut.append(batch(1))
        assert ExperienceLog(directory, "a").get(1) == batch(1)
        assert (directory / shard.name).read_bytes() == data


def test_the_newest_of_two_batches_of_one_step_counts(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path, "a")
    log.append(batch(3, num_groups=1))
    log.append(batch(3, num_groups=2))
    assert ExperienceLog(tmp_path, "a").get(3) == batch(3, num_groups=2)


def test_batches_of_other_settings_are_kept_and_not_found(tmp_path: Path) -> None:
    ExperienceLog(tmp_path / "rollouts" / "rank-00000", "old").append(batch(0))
    log = ExperienceLog(tmp_path / "rollouts" / "rank-00000", "new")
    assert log.get(0) is None
    log.append(batch(1))
    assert [commit["commit"] for commit, _ in read_log(tmp_path)] == [0, 1]


def test_shards_turn_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experience, "_SHARD_BYTES", 1)
    log = ExperienceLog(tmp_path, "a")
    for step in range(3):
        log.append(batch(step))
    assert len(list(tmp_path.iterdir())) == 3
    assert [ExperienceLog(tmp_path, "a").get(step) for step in range(3)] == [
        batch(step) for step in range(3)
    ]


@pytest.mark.parametrize(
    "torn", [b"\0" * 500, b'{"id": "p\0\0\0', b'{"id": "a"}\n{"commit": 1, "vers']
)
def test_what_a_power_cut_leaves_is_cut_off_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes
) -> None:
    ExperienceLog(tmp_path, "a").append(batch(0))
    (shard,) = tmp_path.iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole + torn)
    assert ExperienceLog(tmp_path, "a").get(0) == batch(0)
    assert f"its last {len(torn)} bytes are of a batch that was cut off" in caplog.text
    assert shard.read_bytes() == whole


def test_an_edited_batch_is_noticed(tmp_path: Path) -> None:
    """A bit of a token id is still a token id: only the batch's hash tells."""
    log = ExperienceLog(tmp_path / "rollouts" / "rank-00000", "a")
    log.append(batch(0))
    (shard,) = log.directory.iterdir()
    text = shard.read_text()
    place = text.index('"logps": "') + 14
    shard.write_text(text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :])
    with pytest.raises(
        TrainingError, match=r"shard-00000.*step 1 was edited or damaged.*sampled ag"
    ):
        ExperienceLog(log.directory, "a").get(0)


def test_a_log_of_a_version_without_hashes_is_read(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path, "a")
    log.append(batch(0))
    (shard,) = tmp_path.iterdir()
    *groups, commit = map(json.loads, shard.read_text().splitlines())
    del commit["xxh3"]
    shard.write_text("".join(json.dumps(row) + "\n" for row in (*groups, commit)))
    assert ExperienceLog(tmp_path, "a").get(0) == batch(0)


def test_strange_names_in_the_folder_are_not_ours(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path / "rollouts" / "rank-00000", "a")
    log.append(batch(0))
    for name in ("shard-00000.jsonl.bak", "shard-00000 (copy).jsonl", "shard-0.jsonl"):
        (log.directory / name).write_text("no json")
    (tmp_path / "rollouts" / "rank-old").mkdir()
    (tmp_path / "rollouts" / "rank-00001").write_text("a file")
    assert ExperienceLog(log.directory, "a").get(0) == batch(0)
    assert [commit["rank"] for commit, _ in read_log(tmp_path)] == [0]


@pytest.mark.parametrize(
    "commit", ['{"commit": "0"}', '{"commit"', '{"commit": 0, "version": 0, "groups": 2}']
)
def test_a_commit_that_is_none_is_named_with_its_line(tmp_path: Path, commit: str) -> None:
    ExperienceLog(tmp_path, "a").append(batch(0))
    (shard,) = tmp_path.iterdir()
    shard.write_text(shard.read_text() + commit + "\n")
    with pytest.raises(TrainingError, match=rf"{shard.name}: is not .* its line 4: .*move it away"):
        ExperienceLog(tmp_path, "a")


def test_a_changed_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    log = ExperienceLog(tmp_path, "a")
    log.append(batch(0))
    (shard,) = tmp_path.iterdir()
    shard.write_text(shard.read_text().replace('"stop_reason"', '"stop_season"'))
    with pytest.raises(TrainingError, match=shard.name):
        ExperienceLog(tmp_path, "a").get(0)
