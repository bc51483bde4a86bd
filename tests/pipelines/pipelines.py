"""Pipelines for tests: YAML written in place, run through the command, their folders read back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data_pipelines.manifest import write_record
from prefopt.cli import main
from tests import fork_server

PLUGIN = str(Path(__file__).with_name("made_up.py"))


def write_pipeline(path: Path, stages: list[dict[str, Any]], **settings: Any) -> Path:
    """A pipeline file beside its output (``<name>-out``); the made-up stages are there to be used."""
    raw = {"output_dir": str(path.with_suffix("")) + "-out", "plugins": [PLUGIN], **settings}
    path.write_text(yaml.safe_dump({**raw, "stages": stages}, sort_keys=False))
    return path


def output(path: Path) -> Path:
    """The output folder of a pipeline of `write_pipeline`."""
    return Path(str(path.with_suffix("")) + "-out")


def build(path: Path, *arguments: str) -> Path:
    """Runs a pipeline that must succeed; returns its output folder."""
    assert main(["data", "build", str(path), *arguments]) == 0
    return output(path)


@contextlib.contextmanager
def building(path: Path, *arguments: str, dies_at: int | None = None) -> Iterator[BaseProcess]:
    """A build in a process of its own, which does not outlive the block.

    Args:
        path: of the pipeline.
        arguments: of the command.
        dies_at: SIGKILL itself at this step of writing files: before one is safe, before or after it has its name.
    """
    process = fork_server.fork(_build, path, arguments, dies_at)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def interrupted(path: Path, *arguments: str, shards: int) -> None:
    """A build in this process that Ctrl-C ends once so many shards of `map` stages are recorded."""
    left = iter(range(shards))

    def write(*record: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_record(*record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.stage_runs.write_record", write)
        assert main(["data", "build", str(path), *arguments]) == 130


def _build(path: Path, arguments: tuple[str, ...], dies_at: int | None) -> None:
    if dies_at is not None:
        steps = iter(range(1, dies_at))
        os.fsync, os.replace = (_dying(fn, steps) for fn in (os.fsync, os.replace))
    raise SystemExit(main(["data", "build", str(path), *arguments]))


def _dying(fn: Callable[..., Any], steps: Iterator[int]) -> Callable[..., Any]:
    def step() -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments: Any) -> None:
        step()
        fn(*arguments)
        step()

    return counted


def processes(log: Path) -> list[int]:
    """Who has written into the log of a `slow` stage, the first one first."""
    lines = log.read_text().splitlines() if log.exists() else []
    return list(dict.fromkeys(int(line.split()[1]) for line in lines if len(line.split()) == 2))


def is_alive(pid: int) -> bool:
    """A process that nobody has asked for its exit code yet is dead all the same."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(reached: Callable[[], Any], what: str) -> None:
    """Returns when ``reached()`` holds; a machine that is busy may take its time."""
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def once(reached: Callable[[], Any], act: Callable[[], Any]) -> Iterator[None]:
    """Does ``act()`` when ``reached()`` holds, beside what the block does."""

    def watch() -> None:
        wait_until(reached, "what the test waits for")
        act()

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join()


def refused(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str, code: int = 2) -> str:
    """What a pipeline that must fail says; a traceback would have escaped."""
    capsys.readouterr()
    assert main(["data", "build", str(path), *arguments]) == code
    return " ".join(capsys.readouterr().err.split())


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a stage's folder, in order."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines()]
    return found


def made(folder: Path) -> dict[str, bytes]:
    """Every file that a finished pipeline leaves, by its path: what two equal runs must share."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def without_name(files: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    """Without the manifest of the whole, which has the file's name in it, what the killed left, and ``folders``.

    What was made of what: a stage's record says the same, whoever made its shards.
    """
    return {
        name: data
        for name, data in files.items()
        if name != "manifest.json"
        and "/.tmp-" not in name
        and not name.startswith((".scratch", *folders))
    }


def counts(folder: Path, stage: str) -> dict[str, Any]:
    """Rows in, out and dropped of a finished stage."""
    return json.loads((folder / "manifest" / stage / "done.json").read_text())["counts"]
