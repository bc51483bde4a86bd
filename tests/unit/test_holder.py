"""One holder of a directory: the second is refused and told who has it; one that has ended is no holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt.errors import DataError, InUseError
from prefopt.storage import holder
from prefopt.storage.holder import HOLDER_FILE, Holder, held, refuse_if_held
from tests.recipes.commands import Command, forked


def _hold(root: str, with_child: bool) -> int:
    with held(Path(root), work="run"):
        child = os.fork() if with_child else None
        if child == 0:  # such as a worker that outlives its parent for a while
            signal.pause()
        Path(root, "ready").write_text(str(child))
        signal.pause()
    return 0


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Command]:
    """A process that holds ``root``."""
    with holding(tmp_path) as command:
        yield command


def holding(
    directory: Path, with_child: bool = False
) -> contextlib.AbstractContextManager[Command]:
    root = directory / "root"
    return forked(_hold, str(root), with_child, log=directory / "log", environment=dict(os.environ))


def wait(command: Command, root: Path) -> None:
    command.wait_until(
        lambda: bool(Path(root, "ready").is_file() and Path(root, "ready").read_text()),
        "holding it",
    )


def take(root: Path) -> None:
    with held(root, work="run"):
        pass


def test_the_second_is_told_who_holds_it_and_since_when(tmp_path: Path, other: Command) -> None:
    root = tmp_path / "root"
    wait(other, root)
    since = json.loads((root / HOLDER_FILE).read_text())["since"]
    for attempt in (take, lambda root: refuse_if_held(root, work="run")):
        with pytest.raises(InUseError) as caught:
            attempt(root)
        assert f"{root}: is in use by another run (process {other.pid} on " in str(caught.value)
        assert f"since {since}: " in str(caught.value)
    other.send(signal.SIGKILL)
    other.wait()
    refuse_if_held(root, work="run")
    take(root)
    assert not (root / HOLDER_FILE).exists()


def test_a_child_does_not_go_on_holding_it(tmp_path: Path) -> None:
    with holding(tmp_path, with_child=True) as command:
        wait(command, tmp_path / "root")
        command.send(signal.SIGKILL)
        command.wait()
        child = int((tmp_path / "root" / "ready").read_text())
        try:
            take(tmp_path / "root")
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(holder, "_SETTLE_S", 0.0)


def left_by(root: Path, **changes: object) -> Holder:
    """The record of a holder like this process, in other words."""
    root.mkdir(exist_ok=True)
    record = replace(holder._myself(), **changes)  # type: ignore[arg-type]
    (root / HOLDER_FILE).write_text(json.dumps(record.__dict__))
    return record


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_process_and_its_start_decide(tmp_path: Path, other: Command) -> None:
    wait(other, tmp_path / "root")
    with pytest.raises(InUseError, match=f"process {other.pid} on "):
        take(tmp_path / "root")
    root = tmp_path / "reused"
    left_by(root, pid=other.pid, started="1")  # the number of one that ended, given to another
    take(root)
    left_by(root, pid=2**22 + 1)  # above the largest there can be
    take(root)
    other.send(signal.SIGKILL)
    other.wait()
    take(tmp_path / "root")


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_later_of_two_that_begin_at_once_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: left_by(tmp_path, pid=7, command="the other"))
    with pytest.raises(InUseError, match=r"process 7 on .*: the other"):
        take(tmp_path)


ELSEWHERE = {"host": "node7", "system": "another start", "pid": 1}


def test_a_holder_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(
    tmp_path: Path,
) -> None:
    """Where locks hold on one machine only; here its lock is free, as there."""
    left_by(tmp_path, **ELSEWHERE)
    refuse_if_held(tmp_path, work="run")  # nothing is known of it so fast
    beat = threading.Timer(0.1, lambda: os.utime(tmp_path / HOLDER_FILE, (1, 1)))
    beat.start()
    with pytest.raises(InUseError) as caught:
        take(tmp_path)
    beat.join()
    assert "process 1 on node7, since " in str(caught.value)
    assert f"If that process is gone, delete {tmp_path / HOLDER_FILE}" in str(caught.value)


def test_a_holder_on_another_machine_that_is_silent_is_gone(tmp_path: Path) -> None:
    left_by(tmp_path, **ELSEWHERE)
    os.utime(tmp_path / HOLDER_FILE, (1, 1))
    take(tmp_path)


def test_a_holder_on_another_machine_that_ends_while_it_is_watched_is_gone(tmp_path: Path) -> None:
    left_by(tmp_path, **ELSEWHERE)
    end = threading.Timer(0.1, (tmp_path / HOLDER_FILE).unlink)
    end.start()
    take(tmp_path)
    end.join()


def test_who_holds_it_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "_BEAT_S", 0.01)
    with held(tmp_path, work="run"):
        path = tmp_path / HOLDER_FILE
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0\0"])
def test_a_torn_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / HOLDER_FILE).write_text(text)
    take(tmp_path)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/root.*cannot be written"):
        take(tmp_path / "file" / "root")
