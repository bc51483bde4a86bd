"""Signals and stuck ranks, without a launch: what is decided, and when."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from prefopt.process.guarded import guarded
from prefopt.process.progress import progress
from prefopt.process.stopping import SIGNALS, Stopped, stopping
from prefopt.process.verdicts import Beat, Seen, stuck, verdict


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs between two of these
        pass


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_its_code_and_says_where_it_was(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    # Set first, since a test run under nohup has SIGHUP ignored.
    started = signal.signal(number, signal.default_int_handler)
    try:
        progress.enter("loading the model")
        progress.stands = "nothing was trained, and there is nothing to save"
        assert guarded(lambda: send(number)) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, started)
    name = signal.Signals(number).name
    assert capfd.readouterr().err == (
        f"stopped by {name} while loading the model: nothing was trained, and there is nothing to save\n"
    )


def test_a_hangup_that_is_ignored_stays_ignored(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert guarded(lambda: send(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_deferred_notes_the_first_signal_and_ends_at_the_second(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Stopped) as caught, stopping.handled(), stopping.deferred():
        send(signal.SIGUSR1)
        assert stopping.number == signal.SIGUSR1
        send(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM and caught.value.at_once
    assert capfd.readouterr().err.count("saving and stopping") == 1


def test_what_may_be_given_up_is_given_up_at_the_first_signal() -> None:
    with stopping.handled(), stopping.deferred():
        with pytest.raises(Stopped), stopping.interruptible():
            send(signal.SIGTERM)
        with pytest.raises(Stopped), stopping.interruptible():
            pytest.fail("it began after the signal")


def test_a_launcher_that_repeats_a_request_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue signals all processes, and the launcher passes on what it got itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with stopping.handled(), stopping.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stopping.number == signal.SIGTERM


def test_outside_the_main_thread_nothing_is_handled() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(guarded(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


# --- who is stuck --------------------------------------------------------------------------------


def seen(
    rank: int, *, place: int = 3, idle: float = 0.0, silent: float = 0.0, **more: object
) -> Seen:
    fields = {"what": "training step 7", "limit_s": 60.0, "where": "", "waits": False, **more}
    beat = Beat(rank, f"node-{rank}", 100 + rank, rank, 1, place, idle_s=idle, **fields)  # type: ignore[arg-type]
    return Seen(beat, silent)


def ranks(found: list[Seen]) -> list[int]:
    return [each.beat.rank for each in found]


def test_a_run_that_gets_on_is_not_stuck() -> None:
    assert stuck([seen(0, idle=59), seen(1, idle=59)]) == []
    # Rank 0 has waited for long, for one that is slow but moves.
    assert stuck([seen(0, idle=500, waits=True), seen(1, idle=2)]) == []
    assert stuck([seen(0, idle=500, limit_s=None), seen(1, idle=500, limit_s=None)]) == []
    assert stuck([seen(0, idle=500, done=True)]) == []


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    assert ranks(stuck([seen(0, idle=70, waits=True), seen(1, idle=70)])) == [1]
    assert ranks(
        stuck([seen(0, idle=70, place=4), seen(1, idle=70), seen(2, idle=70, place=4)])
    ) == [1]
    # One that has gone quiet may have been in a phase without a limit when it last spoke.
    assert ranks(stuck([seen(0, idle=70), seen(1, silent=70, place=1, limit_s=None)])) == [1]
    assert ranks(stuck([seen(0, idle=70, waits=True), seen(1, idle=70, waits=True)])) == [0, 1]


def test_the_verdict_says_who_where_and_for_how_long() -> None:
    all_ranks = [seen(0, idle=70, waits=True), seen(1, idle=70, where="plugin.py:7 in score")]
    text = verdict(stuck(all_ranks), all_ranks)
    assert "more than 60 s (run.stuck_after_s)" in text
    assert (
        "rank 1 (node-1, process 101) has been training step 7 for 70 s, at plugin.py:7 in score"
        in text
    )
    assert "the others wait for it" in text
    all_ranks = [seen(0, idle=70), seen(1, silent=80)]
    assert "rank 1 (node-1, process 101) does not answer, for 80 s" in verdict(
        stuck(all_ranks), all_ranks
    )
    all_ranks = [seen(0, idle=70, waits=True), seen(1, idle=70, waits=True)]
    assert "all wait for each other" in verdict(stuck(all_ranks), all_ranks)
