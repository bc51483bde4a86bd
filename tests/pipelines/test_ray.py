"""Two machines of a real Ray cluster, both this one: what they make, and what the loss of one of them changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from data_pipelines.base import Needs
from data_pipelines.on_ray import _Crew
from data_pipelines.registry import get_stage
from tests.pipelines.conftest import NODE
from tests.pipelines.pipelines import (
    build,
    is_alive,
    made,
    once,
    processes,
    refused,
    wait_until,
    without_name,
    write_pipeline,
)

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.timeout(600)  # a lost worker shows as waiting for ever

GROUPS: list[dict[str, Any]] = [{"stage": "made_up", "num_rows": 70}]


@pytest.mark.parametrize("stays", [False, True], ids=["tasks", "actors"])
def test_a_machine_is_lost_in_the_middle_and_the_bytes_are_those_of_a_calm_run(
    tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture, stays: bool
) -> None:
    """Both machines are at a shard when one is killed; the other makes that shard again, and the rest."""
    second = cluster.add_node(**NODE)
    log, gate = tmp_path / "log", tmp_path / "gate"
    slow = {"stage": "slow", "log": str(log), "gate": str(gate), "stays": stays}
    path = write_pipeline(tmp_path / "p.yaml", [*GROUPS, slow], shard_rows=20)

    def lose_one() -> None:
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: not all(map(is_alive, processes(log))), "the end of its worker")
        gate.touch()

    with once(lambda: len(processes(log)) == 2, lose_one):
        folder = build(path, "executor.name=ray", f"executor.address={cluster.address}")
    first = [line.split()[0] for line in log.read_text().splitlines()]
    assert sorted(first.count(each) for each in set(first)) == [1, 1, 1, 2]
    assert "the shard is made again" in caplog.text
    calm = build(
        write_pipeline(tmp_path / "calm.yaml", [*GROUPS, {"stage": "slow"}], shard_rows=20)
    )
    assert without_name(made(folder)) == without_name(made(calm))


def test_a_worker_that_waits_for_the_core_of_an_idle_one_gets_it(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine is gone before Ray knows: a second worker was asked for, and there is one core for both."""
    rooms = iter([2])
    monkeypatch.setattr(_Crew, "room", lambda self: next(rooms, 1))
    slow = {"stage": "slow", "stays": True}
    path = write_pipeline(tmp_path / "p.yaml", [*GROUPS, slow], shard_rows=40)
    folder = build(path, "executor.name=ray", f"executor.address={cluster.address}")
    calm = build(
        write_pipeline(tmp_path / "calm.yaml", [*GROUPS, {"stage": "slow"}], shard_rows=40)
    )
    assert without_name(made(folder)) == without_name(made(calm))


def test_what_goes_wrong_on_the_cluster_is_said_as_on_one_machine(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", [*GROUPS, {"stage": "slow"}], shard_rows=100)
    ray = ("executor.name=ray", f"executor.address={cluster.address}", "executor.max_retries=1")
    said = refused(capsys, path, *ray, "stages.slow.lose=true", code=1)
    assert "stage 'slow' answered 63 times for 64 rows" in said
    said = refused(capsys, path, *ray, "--from", "slow", "stages.slow.deadly=q0", code=1)
    assert "stage 'slow', shard 0 (" in said and "2 workers died on it" in said
    said = refused(capsys, path, *ray, "executor.num_gpus=1", code=1)
    assert "no machine of the Ray cluster has 1 cores and 1 GPUs" in said


@pytest.mark.parametrize(
    ("stage", "keys", "needs"),
    [
        ("sample", {"engine": {"name": "hf"}}, Needs(True, 1)),
        ("sample", {"engine": {"name": "hf", "device": "cpu"}}, Needs(True, 0)),
        ("sample", {"engine": {"name": "vllm", "tensor_parallel_size": 2}}, Needs(True, 2)),
        (
            "sample",
            {"engine": {"name": "vllm_server", "num_servers": 2, "tensor_parallel_size": 4}},
            Needs(True, 8),
        ),
        ("sample", {"engine": {"name": "vllm_server", "urls": ["http://a:1"]}}, Needs(True, 0)),
        ("score", {"signals": [{"name": "reward_model", "path": "m"}]}, Needs(True, 1)),
        ("score", {"signals": [{"name": "length_penalty"}]}, Needs(False, 0)),
        ("advantage", {"head": "h"}, Needs(True, 1)),
        ("filter", {"min_margin": 1.0}, Needs(False, 0)),
    ],
)
def test_a_stage_says_what_its_workers_take_up(
    stage: str, keys: dict[str, Any], needs: Needs
) -> None:
    model = {"model": {"path": "m"}} if stage == "sample" else {}
    assert get_stage(stage).settings.model_validate({**model, **keys}).needs() == needs


def test_a_cluster_that_is_not_there_is_known_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", [*GROUPS, {"stage": "slow"}])
    assert "executor.address is missing" in refused(capsys, path, "executor.name=ray")
    ray = ("executor.name=ray", "executor.address=127.0.0.1:9")
    assert "no Ray cluster answers there" in refused(capsys, path, *ray)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'prefopt[ray]'" in refused(capsys, path, *ray)
    assert not (tmp_path / "p-out").exists()
