"""The runner: what it writes is a function of the pipeline alone, and nothing it did is trusted blindly."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from tests.pipelines.pipelines import (
    build,
    building,
    counts,
    is_alive,
    made,
    once,
    output,
    processes,
    refused,
    rows,
    wait_until,
    without_name,
    write_pipeline,
)

GROUPS: list[dict[str, Any]] = [{"stage": "made_up", "num_rows": 230}]
PAIRS = [*GROUPS, {"stage": "slow"}, {"stage": "pair"}]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "p.yaml", PAIRS, shard_rows=20)


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefopt.cli", "data", "build", str(path), *arguments]


def test_every_row_is_kept_or_counted_with_its_reason(pipeline: Path) -> None:
    folder = build(pipeline)
    first, last = counts(folder, "made_up"), counts(folder, "pair")
    assert first["rows_in"] == 230 == first["rows_out"] + first["dropped"]["unlucky"]
    assert last["rows_in"] == first["rows_out"]
    assert last["rows_in"] == last["rows_out"] + sum(last["dropped"].values())
    listed = [
        json.loads(line)
        for file in (folder / "manifest" / "pair").glob("*.dropped.jsonl")
        for line in file.read_text().splitlines()
    ]
    kept = {row["id"] for row in rows(folder / "pair")}
    assert {line["id"] for line in listed} | kept == {row["id"] for row in rows(folder / "slow")}
    for row in rows(folder / "pair"):
        assert row["score_chosen"] > row["score_rejected"]
        assert row["chosen"] != row["rejected"]


def test_shard_size_changes_files_and_no_row(pipeline: Path, tmp_path: Path) -> None:
    other = write_pipeline(tmp_path / "other.yaml", PAIRS, shard_rows=7)
    assert rows(build(pipeline) / "pair") == rows(build(other) / "pair")


def test_parquet_holds_the_same_rows(pipeline: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    other = write_pipeline(tmp_path / "other.yaml", PAIRS, shard_rows=20, format="parquet")
    folder = build(other)
    found = [
        row
        for file in sorted((folder / "pair").glob("*.parquet"))
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    assert found == rows(build(pipeline) / "pair")


def test_a_finished_pipeline_runs_nothing_again(pipeline: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    build(pipeline, f"stages.slow.log={log}")
    before = made(output(pipeline))
    build(pipeline, f"stages.slow.log={log}")
    assert len(log.read_text().splitlines()) == 11
    assert made(output(pipeline)) == before


def test_the_folder_of_a_stage_is_a_data_source(pipeline: Path) -> None:
    from prefopt.data.sources import open_source
    from prefopt.recipe.schema import SourceSection

    folder = build(pipeline) / "pair"
    found = [raw.data for raw in open_source(SourceSection(path=str(folder))).rows()]
    assert found == rows(folder)


# -- killed, and shared --------------------------------------------------------------------------------------


def test_killed_twenty_times_the_files_are_those_of_a_calm_run(tmp_path: Path) -> None:
    """A hundred shards a stage, SIGKILL at drawn steps of writing them."""
    stages = [
        {"stage": "made_up", "num_rows": 2_120},
        {"stage": "slow"},
        {"stage": "pair"},
        {"stage": "order", "by": {"margin": 1.0}, "keep_frac": 0.9},
        {"stage": "filter", "min_margin": 2.0},
    ]
    settings = {"shard_rows": 20, "seed": 3}
    calm = build(write_pipeline(tmp_path / "calm.yaml", stages, **settings))
    harsh = write_pipeline(tmp_path / "harsh.yaml", stages, **settings)
    draw, kills = random.Random(0), 0
    while kills < 20:
        with building(harsh, dies_at=draw.randint(1, 400)) as process:
            process.join()
        if process.exitcode == 0:  # done: begin again, so that every kill hits a pipeline at work
            assert made(output(harsh)).keys() >= made(calm).keys()
            shutil.rmtree(output(harsh))
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    build(harsh)
    assert without_name(made(output(harsh))) == without_name(made(calm))
    assert len(list((calm / "slow").glob("*.jsonl"))) == 100


def test_workers_make_what_one_process_makes_and_no_shard_twice(tmp_path: Path) -> None:
    """Also where a stage is made again."""
    log = tmp_path / "log"
    stages = [*GROUPS, {"stage": "slow", "company": True, "log": str(log)}, {"stage": "pair"}]
    path = write_pipeline(tmp_path / "p.yaml", stages, shard_rows=20)
    calm = build(write_pipeline(tmp_path / "calm.yaml", PAIRS, shard_rows=20))
    for again in ((), ("--from", "slow")):
        log.unlink(missing_ok=True)
        folder = build(path, "--workers", "2", *again)
        first = [line.split()[0] for line in log.read_text().splitlines()]
        assert len(set(first)) == len(first) == 11 and len(processes(log)) == 2
        assert without_name(made(folder), "replaced") == without_name(made(calm))


def gated(tmp_path: Path, **settings: Any) -> tuple[Path, Path, Path]:
    """A pipeline whose `slow` shards wait for a file, its log, and that file."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    slow = {"stage": "slow", "log": str(log), "gate": str(gate)}
    path = write_pipeline(tmp_path / "p.yaml", [*GROUPS, slow, {"stage": "pair"}], **settings)
    return path, log, gate


def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, log, gate = gated(tmp_path, shard_rows=20)

    def kill_one() -> None:
        os.kill(processes(log)[0], signal.SIGKILL)
        gate.touch()

    with once(lambda: len(processes(log)) == 2, kill_one):
        folder = build(path, "--workers", "2")
    lost = log.read_text().split()[0]
    first = [line.split()[0] for line in log.read_text().splitlines()]
    assert first.count(lost) == 2 and len(first) == 12
    assert "(killed by SIGKILL); the shard is made again" in caplog.text
    calm = build(write_pipeline(tmp_path / "calm.yaml", PAIRS, shard_rows=20))
    assert without_name(made(folder)) == without_name(made(calm))


def test_a_shard_that_kills_its_workers_ends_the_build_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", PAIRS, shard_rows=100)
    said = refused(
        capsys, path, "--workers", "2", "stages.slow.deadly=q0", "executor.max_retries=1", code=1
    )
    assert (
        "stage 'slow', shard 0 (" in said and "made_up/00000.jsonl): 2 workers died on it" in said
    )
    assert "executor.max_retries = 1; the last one: killed by SIGKILL" in said
    folder = build(path)  # the same command without what was wrong
    calm = build(write_pipeline(tmp_path / "calm.yaml", PAIRS, shard_rows=100))
    assert without_name(made(folder)) == without_name(made(calm))


def test_what_a_stage_raises_in_a_worker_is_what_the_command_says(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, pipeline, "--workers", "2", "stages.slow.lose=true", code=1)
    assert "answered 19 times for 20 rows" in said


def test_a_killed_driver_takes_its_workers_along_and_the_next_one_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log, gate = gated(tmp_path, shard_rows=20)
    with building(path, "--workers", "2") as driver:
        wait_until(lambda: len(processes(log)) == 2, "two workers")
        said = refused(capsys, path, code=1)
        assert f"is in use by another build (process {driver.pid} on " in said
        workers = processes(log)
        driver.kill()
        driver.join()
    wait_until(lambda: not any(map(is_alive, workers)), "the workers' end")
    assert not list((output(path) / "slow").glob("*"))
    gate.touch()
    folder = build(path)
    calm = build(write_pipeline(tmp_path / "calm.yaml", PAIRS, shard_rows=20))
    assert without_name(made(folder)) == without_name(made(calm))


def test_status_says_how_far_a_stage_is(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = build(pipeline) / "manifest" / "slow"
    for name in ("done", "00003"):
        (records / f"{name}.json").unlink()
    assert main(["data", "status", str(pipeline)]) == 0
    assert "not finished: 10 shards made" in capsys.readouterr().out


# -- changed, edited, broken ---------------------------------------------------------------------------------


def test_a_changed_setting_is_refused_with_what_changed(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(pipeline)
    before = made(folder)
    said = refused(capsys, pipeline, "stages.pair.rule.name=all_pairs")
    assert (
        'stage \'pair\' was made differently: settings.rule.name was "best_worst" and is now "all_pairs"'
        in said
    )
    assert "--from pair" in said
    assert made(folder) == before


def test_from_redoes_a_stage_and_keeps_what_there_was(pipeline: Path) -> None:
    folder = build(pipeline)
    old = rows(folder / "pair")
    build(pipeline, "--from", "pair", "stages.pair.rule.name=all_pairs")
    assert len(rows(folder / "pair")) > len(old)
    assert rows(folder / "replaced" / "pair-1" / "shards") == old


def test_redoing_a_stage_alone_is_refused_for_those_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", PAIRS)
    folder = build(path)
    shutil.rmtree(folder / "manifest" / "slow")
    shutil.rmtree(folder / "slow")
    assert "stage 'slow' is to be made first" in refused(capsys, path)


def test_changed_code_is_refused_and_neither_a_comment_nor_an_import_is_a_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own: a module is imported once."""
    plugin = tmp_path / "made_up.py"
    source = Path(__file__).with_name("made_up.py").read_text()
    plugin.write_text(source)
    path = write_pipeline(tmp_path / "p.yaml", PAIRS, plugins=["made_up.py"])

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(path), capture_output=True, text=True, check=False)

    assert run().returncode == 0
    plugin.write_text(
        source.replace('"""Adds a drawn', '"""Gives a drawn').replace(
            "import os\n", "import os  # why\nimport json as _moved\n"
        )
    )
    assert run().returncode == 0
    plugin.write_text(source.replace('"drawn": self', '"drew": self'))
    done = run()
    assert done.returncode == 2
    assert "stage 'made_up' was made differently: code.prefopt_plugin_made_up" in done.stderr


@pytest.mark.parametrize("record", ["slow/00003.json", "slow/done.json", "made_up/stage.json"])
def test_a_record_edited_by_hand_is_refused(
    pipeline: Path, capsys: pytest.CaptureFixture[str], record: str
) -> None:
    path = build(pipeline) / "manifest" / record
    shown = json.loads(path.read_text())
    path.write_text(json.dumps({**shown, next(iter(shown)): "something else"}))
    if record.endswith(
        "00003.json"
    ):  # a finished stage is read from its own record: as if killed before it
        (path.parent / "done.json").unlink()
        shutil.rmtree(path.parent.parent / "pair")
        shutil.rmtree(output(pipeline) / "pair")
    said = refused(capsys, pipeline, code=1)
    assert (
        f"{path}: is not a record of a pipeline as written: it was edited by hand" in said
        and "--from" in said
    )


def test_a_changed_shard_is_refused_when_it_is_read(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(pipeline)
    shard = folder / "slow" / "00002.jsonl"
    shard.write_text(shard.read_text().replace("answer", "Answer", 1))
    said = refused(capsys, pipeline, "--from", "pair", code=1)
    assert f"{shard}: was changed since it was written" in said and "--from slow" in said


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.slow.lose=true", "answered 19 times for 20 rows"),
        ("stages.slow.silent=true", "came to nothing without a reason"),
    ],
)
def test_a_stage_that_loses_rows_is_caught(
    pipeline: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    assert says in refused(capsys, pipeline, setting, code=1)


def test_a_full_disk_says_so_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A limit on file size in a process of its own: the kernel refuses the write as a full disk does."""
    path = write_pipeline(tmp_path / "p.yaml", PAIRS, shard_rows=20)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from prefopt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "data", "build", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr and "goes on from here" in done.stderr
    folder = build(path)
    other = build(write_pipeline(tmp_path / "other.yaml", PAIRS, shard_rows=20))
    assert rows(folder / "pair") == rows(other / "pair")


def test_a_stage_that_drops_everything_ends_the_pipeline_with_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", [*PAIRS, {"stage": "filter", "min_margin": 99.0}])
    said = refused(capsys, path, code=1)
    assert "stage 'filter': not one row is left" in said and "margin_below" in said


# -- settings ------------------------------------------------------------------------------------------------


def test_all_problems_of_a_pipeline_come_at_once_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'out'}\nshard_row: 5\nplugins: [made_up.py]\n"
        "stages:\n- stage: made_up\n  num_rows: many\n- stage: pair\n  rule: {name: best_wrost}\n"
        "- stage: pair\n- stage: filter\n  accuracy_band: [0.9, 0.1]\n"
    )
    shutil.copy(Path(__file__).with_name("made_up.py"), tmp_path)
    said = refused(capsys, path)
    assert "line 2: shard_row: unknown key; did you mean 'shard_rows'?" in said
    assert "line 6: stages.0.num_rows = 'many': must be a whole number" in said
    assert "line 8:" in said and "did you mean 'best_worst'?" in said
    assert "line 9: stages.2.stage = 'pair': takes groups, and the stage before gives pairs" in said
    assert "line 11: filter.accuracy_band: would be ignored" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lease_s=60", "there are no leases: one command hands out the shards"),
        ("executor.name=rya", "must be 'local' or 'ray'; did you mean 'ray'?"),
        ("executor.worker=2", "unknown key; did you mean 'workers'?"),
        ("executor.address=head:6379", "belongs to executor.name = 'ray'"),
        ("executor.workers=0", "executor.workers = 0: must be > 0"),
    ],
)
def test_an_executor_that_cannot_be_meant_is_refused(
    pipeline: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    assert says in refused(capsys, pipeline, setting)
    assert not output(pipeline).exists()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"stage": "pair"}], "needs rows; start with one of"),
        ([*GROUPS, {"stage": "made_up", "num_rows": 1}], "reads files, so it comes first"),
        ([*GROUPS, {"stage": "piar"}], "did you mean 'pair'?"),
        ([*GROUPS, {"stage": "slow", "id": "a/b"}], "is a folder's name"),
        (
            [*GROUPS, {"stage": "slow", "id": "x"}, {"stage": "slow", "id": "x"}],
            "second stage is called 'x'",
        ),
        ([*GROUPS, {"stage": "filter"}], "no rule is set"),
        (
            [*GROUPS, {"stage": "filter", "where": {"quality": [1, None]}}],
            "reads the column 'quality'",
        ),
        ([*GROUPS, {"stage": "order"}], "is of pairs, and the stage before gives groups"),
        (
            [*GROUPS, {"stage": "pair", "rule": {"name": "group_mean"}}],
            "gives advantages, and `pair` needs",
        ),
        ([*GROUPS, {"stage": "advantage", "rule": {"name": "best_worst"}}], "gives no advantages"),
    ],
)
def test_a_pipeline_that_cannot_work_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: list[dict[str, Any]], says: str
) -> None:
    path = write_pipeline(tmp_path / "p.yaml", stages)
    assert says in refused(capsys, path)
    assert not output(path).exists()


def test_the_command_line_is_light() -> None:
    script = (
        "import sys, data_pipelines.cli as c, data_pipelines.runner as r, data_pipelines.stages.filter as f\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "datasets", "vllm", "rensa", "pyarrow"}
