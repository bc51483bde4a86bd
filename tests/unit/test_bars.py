"""Long work seen from a log file, silent waits, and locks that nobody holds."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.model.extensions import check_locks, unheld_locks
from prefopt.report import bars
from prefopt.report.bars import Bar, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_and_no_carriage_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of an eighth of a second on tqdm's clock: a line every 30 s, and the first and the last."""
    log, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", log)
    with Bar(total=1000, desc="train", unit="step") as bar:
        monkeypatch.setattr(bar, "_time", lambda: clock[0])
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(1000):
            clock[0] += 0.125
            bar.set_postfix({"total": "0.5"})
            bar.update(1)
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert [line.split(" [")[0] for line in lines] == [
        "train: 0/1000 step",
        "train: 240/1000 step",
        "train: 480/1000 step",
        "train: 720/1000 step",
        "train: 960/1000 step",
        "train: 1000/1000 step",
    ]


def test_short_work_that_leaves_nothing_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(Bar(range(5), desc="eval", leave=False)) == [0, 1, 2, 3, 4]
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in Bar(range(3), desc="train"):
        pass
    assert "\r" in terminal.getvalue() and "100%|" in terminal.getvalue()


def test_a_silent_wait_says_what_for_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()

    def detail() -> str:
        told.set()
        return "; its log: x"

    with caplog.at_level(logging.INFO, bars.__name__):
        with waiting("vLLM: starting", detail=detail, every_s=0.01):
            assert caplog.messages == ["vLLM: starting"]
            assert told.wait(300)
        said = len(caplog.messages)
    assert caplog.messages[1].startswith("vLLM: starting: still waiting, 0 s; its log: x")
    assert caplog.messages[-1] == "vLLM: starting: done after 0 s"
    assert len(caplog.messages) == said  # nobody reminds any more


def test_a_lock_whose_process_is_gone_is_named(tmp_path: Path) -> None:
    """One that is held, a new one, and one from before: only the last would be waited for in vain."""
    locks = [tmp_path / "py311_cpu" / name / "lock" for name in ("held", "new", "old")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
        hour_ago = time.time() - 3600
        if lock.parent.name != "new":
            os.utime(lock, (hour_ago, hour_ago))
    with locks[0].open():
        assert set(unheld_locks(tmp_path)) == {locks[1], locks[2]}
        with pytest.raises(ConfigError) as caught:
            check_locks(tmp_path)
        said = str(caught.value)
        assert f"rm {locks[2]}" in said and str(locks[0]) not in said and str(locks[1]) not in said
        locks[2].unlink()
        check_locks(tmp_path)
