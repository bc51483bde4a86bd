"""Engines' child processes: they die alone, are noticed, started again, and leave nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefopt.engines.base import Request, SamplingSpec
from prefopt.engines.child import GuardedProcess, Watchdog, clean_environment
from prefopt.engines.process import HFSource, ProcessEngine
from prefopt.errors import EngineError, ModelError
from prefopt.recipe.schema import ModelSection
from tests.engines.policies import Policies
from tests.engines.processes import HANG_S, is_gone, wait_until
from tests.recipes.commands import forked

REQUESTS = [Request((5, 6, 7), (0, 1)), Request((8,), (2,))]
SPEC = SamplingSpec(8)
Factory = Callable[..., ProcessEngine]


@pytest.fixture
def make(policies: Policies, tmp_path: Path) -> Iterator[Factory]:
    engines: list[ProcessEngine] = []

    def build(max_restarts: int = 1, **settings: Any) -> ProcessEngine:
        source = HFSource(
            ModelSection(path=str(settings.pop("path", policies.adapters[0]))), 0, **settings
        )
        engine = ProcessEngine(
            source, log_dir=tmp_path, startup_timeout_s=800.0, max_restarts=max_restarts
        )
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_killed_child_is_started_again_with_the_current_policy(
    make: Factory, policies: Policies, tmp_path: Path
) -> None:
    engine = make()
    files, _ = policies.files(5, is_adapter=True, directory=tmp_path)
    engine.load_policy(files)
    before = engine.generate(REQUESTS, SPEC)
    kill(engine.pid)
    assert engine.generate(REQUESTS, SPEC) == before  # to the last bit: same weights, same seeds
    assert engine.version == 5
    kill(engine.pid)
    with pytest.raises(EngineError, match=r"SIGKILL[\s\S]*max_restarts"):
        engine.generate(REQUESTS, SPEC)


def test_a_child_killed_while_it_works_is_noticed_at_once(make: Factory) -> None:
    engine = make(max_restarts=0)
    engine.start()
    os.kill(engine.pid or 0, signal.SIGSTOP)  # so that it cannot answer before it dies
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {engine.pid}"]).wait()
    started = time.monotonic()
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.generate(REQUESTS, SPEC)
    assert time.monotonic() - started < HANG_S  # the deadline is half an hour


LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "LOCAL_RANK")


@pytest.fixture(scope="module")
def hurried(
    policies: Policies, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessEngine]:
    """An engine on one core, with next to no time for a call, started as by a launched process."""
    model = ModelSection(path=str(policies.adapters[0]))
    source = HFSource(model, 0, timeout_s=0.02, cpus=(max(os.sched_getaffinity(0)),))
    directory = tmp_path_factory.mktemp("hurried")
    engine = ProcessEngine(source, log_dir=directory, startup_timeout_s=800.0, max_restarts=9)
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER:
            patch.setenv(name, "1")
        engine.start()
    yield engine
    engine.close()


def test_the_child_has_its_own_cores_and_nothing_of_the_launcher(hurried: ProcessEngine) -> None:
    assert hurried.pid is not None
    assert os.sched_getaffinity(hurried.pid) == {max(os.sched_getaffinity(0))}
    assert not set(LAUNCHER) & set(psutil.Process(hurried.pid).environ())
    assert os.getpgid(hurried.pid) != os.getpgid(0)  # the terminal's Ctrl-C goes to our group only


def test_a_generation_past_its_deadline_says_how_far_it_came(hurried: ProcessEngine) -> None:
    hurried.start()
    with pytest.raises(EngineError, match=r"of 100 tokens of 3 responses.*max_new_tokens"):
        hurried.generate(REQUESTS, SamplingSpec(100))


def test_a_child_that_never_answers_is_ended_at_the_deadline(hurried: ProcessEngine) -> None:
    hurried.start()
    pid = hurried.pid or 0
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"waited 0\.02 s for generate.*timeout_s"):
        hurried.generate(REQUESTS, SPEC)
    assert is_gone(pid)
    hurried.close()
    hurried.close()
    assert hurried.pid is None


def test_a_policy_that_cannot_be_loaded_is_the_childs_own_error(
    make: Factory, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="absent"):
        make(path=tmp_path / "absent").start()


def start_and_die(base: str, directory: str) -> int:
    engine = ProcessEngine(HFSource(ModelSection(path=base), 0), log_dir=Path(directory))
    engine.start()
    Path(directory, "pid").write_text(str(engine.pid))
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_the_child_ends_when_its_parent_is_killed(policies: Policies, tmp_path: Path) -> None:
    arguments = str(policies.base), str(tmp_path)
    with forked(start_and_die, *arguments, log=tmp_path / "log", environment=os.environ) as parent:
        assert parent.wait() == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: is_gone(pid))


GRANDCHILD = ["sh", "-c", "sleep 300 & sleep 300"]
"""A command with a child of its own, as a vLLM server has."""


def test_stopping_a_guarded_process_ends_its_whole_group(tmp_path: Path) -> None:
    process = GuardedProcess(GRANDCHILD, clean_environment(), tmp_path / "log")
    assert process.pid is not None and process.poll() is None
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(family) >= 2 or wait_until(lambda: bool(psutil.Process(process.pid).children()))
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.stop(grace_s=1.0)
    process.stop(grace_s=1.0)
    assert wait_until(lambda: all(is_gone(member.pid) for member in family))


def test_a_guarded_process_that_is_killed_is_reported_and_its_children_end(tmp_path: Path) -> None:
    process = GuardedProcess(GRANDCHILD, clean_environment(), tmp_path / "log")
    assert process.pid is not None
    assert wait_until(lambda: bool(psutil.Process(process.pid).children()))
    children = psutil.Process(process.pid).children(recursive=True)
    kill(process.pid)
    assert wait_until(lambda: process.poll() == -signal.SIGKILL)
    assert wait_until(lambda: all(is_gone(child.pid) for child in children))
    process.stop()


def test_a_guarded_process_ends_when_its_starter_is_killed_even_if_a_thread_started_it(
    tmp_path: Path,
) -> None:
    """The thread that started it has ended long before: that must not end it, and the kill must."""
    script = f"""
import os, signal, threading, time
from pathlib import Path
from prefopt.engines.child import GuardedProcess, clean_environment
found = []
thread = threading.Thread(target=lambda: found.append(
    GuardedProcess({GRANDCHILD!r}, clean_environment(), Path({str(tmp_path / "log")!r}))))
thread.start()
thread.join()
time.sleep(1)
print(found[0].pid, found[0].poll(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_S
    )
    pid, state = done.stdout.split()
    assert state == "None"
    assert wait_until(lambda: is_gone(int(pid)))


def test_watched_processes_end_with_the_one_that_watches_and_not_when_the_watch_is_dismissed(
    tmp_path: Path,
) -> None:
    """vLLM's subprocess in process: started by a library, it does not notice that the trainer was killed.

    One is known by its pid, the other by what it was started with: nobody was told its pid before the kill.
    """
    watchdog = Watchdog()
    spared = subprocess.Popen(["sleep", "300"], env={**os.environ, **watchdog.variables})
    told = subprocess.Popen(["sleep", "300"])
    watchdog.add([spared.pid])
    watchdog.dismiss()
    watchdog.dismiss()
    script = f"""
import os, signal, subprocess
from prefopt.engines.child import Watchdog
watchdog = Watchdog()
watchdog.add([{told.pid}])
started = subprocess.Popen(["sleep", "300"], env={{**os.environ, **watchdog.variables}}, stdout=subprocess.DEVNULL)
print(started.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=HANG_S)
    assert told.wait(HANG_S) == -signal.SIGKILL
    assert wait_until(lambda: is_gone(int(done.stdout)), timeout_s=30)
    assert spared.poll() is None
    spared.kill()
    spared.wait()
