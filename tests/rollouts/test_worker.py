"""Jobs run in order, fail in order, and nobody waits for ever."""

from __future__ import annotations

import threading

import pytest

from prefopt.errors import EngineError
from prefopt.rollouts.worker import Worker, wait


@pytest.mark.parametrize("threaded", [False, True])
def test_jobs_run_in_order(threaded: bool) -> None:
    worker, seen = Worker(threaded=threaded), []
    futures = [worker.submit(lambda i=i: seen.append(i) or i) for i in range(20)]
    assert [wait(future, 5, "it") for future in futures] == list(range(20)) == seen
    worker.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_what_follows_a_failure_fails_alike(threaded: bool) -> None:
    worker, seen = Worker(threaded=threaded), []

    def fail() -> None:
        raise EngineError("the push failed")

    first, second = worker.submit(fail), worker.submit(lambda: seen.append(1))
    for future in (first, second):
        with pytest.raises(EngineError, match="the push failed"):
            wait(future, 5, "it")
    assert not seen
    worker.close()


def test_a_wait_ends_and_says_for_what() -> None:
    worker, release = Worker(threaded=True), threading.Event()
    future = worker.submit(lambda: release.wait(10))
    with pytest.raises(EngineError, match=r"waited 0\.05 s for the rollouts of step 3"):
        wait(future, 0.05, "the rollouts of step 3")
    release.set()
    worker.close()


def test_a_threaded_worker_does_not_block_its_caller() -> None:
    worker, release = Worker(threaded=True), threading.Event()
    future = worker.submit(release.wait)
    assert not future.done()
    release.set()
    assert wait(future, 5, "it")
    worker.close()
