"""vLLM engines that die, are not there, or serve something else; the servers are those of the contract."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from prefopt.engines.base import PolicyFiles, Request, SamplingSpec
from prefopt.engines.child import free_port
from prefopt.engines.vllm.door import KEY_VARIABLE
from prefopt.engines.vllm.hosts import FoundHost, StartedHost
from prefopt.engines.vllm.server import VllmServers
from prefopt.errors import EngineError
from tests.engines.conftest import Running, make_engine
from tests.engines.policies import Policies
from tests.engines.processes import HANG_S, is_gone, wait_until
from tests.engines.test_contract import PROMPTS, SPEC, assert_logps_are_the_truth, requests
from tests.fork_server import fork

server = pytest.mark.parametrize("running", ["vllm_server"], indirect=True)
local = pytest.mark.parametrize("running", ["vllm"], indirect=True)


def host(running: Running) -> StartedHost:
    [found] = running.engine.hosts
    assert isinstance(found, StartedHost)
    return found


def found(running: Running, model: Path) -> VllmServers:
    """The same server as one that was given by URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, host(running).key)
        at = FoundHost(host(running).client.url, startup_timeout_s=400.0)
    return VllmServers([at], model=str(model), timeout_s=600.0)


@server
def test_a_server_at_a_url_samples_the_same_and_takes_policies(running: Running) -> None:
    running.push(1)
    engine = found(running, running.policies.base)
    files, _ = running.policies.files(901, is_adapter=True, directory=running.directory)
    engine.load_policy(files)
    assert engine.generate(requests(), SPEC) == running.engine.generate(requests(), SPEC)
    engine.close()
    engine.close()
    assert running.engine.generate(requests(), SPEC)  # the server itself is left running


@server
def test_a_url_that_serves_another_model_is_refused(running: Running) -> None:
    with pytest.raises(EngineError, match=r"serves .*model0.*trains .*model1"):
        found(running, running.policies.other).generate(requests(), SPEC)


@server
def test_full_weights_need_a_server_that_takes_them(running: Running) -> None:
    engine = found(running, running.policies.base)
    with pytest.raises(EngineError, match=r"version 3 cannot be loaded.*VLLM_SERVER_DEV_MODE"):
        engine.load_policy(PolicyFiles(3, running.policies.other, is_adapter=False))
    engine.close()


@server
def test_every_route_asks_for_the_key_of_this_start(running: Running) -> None:
    """Routes that the server itself lists, and some that it does not, by every method; with the key it answers."""
    at = host(running)
    url = at.client.url
    with httpx2.Client(
        base_url=url, trust_env=False, headers={"Authorization": f"Bearer {at.key}"}
    ) as ours:
        listed = ours.get("/openapi.json").json()["paths"]
        assert ours.get("/health").status_code == 200
    routes = {
        (method.upper(), re.sub(r"{\w+}", "x", path))
        for path, ways in listed.items()
        for method in ways
    }
    assert {path for _, path in routes} >= {"/v1/completions", "/v1/load_lora_adapter", "/health"}
    more = [
        "/metrics",
        "/docs",
        "/openapi.json",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/sleep",
        "/",
        "/no/such",
    ]
    routes |= {(method, path) for path in more for method in ("GET", "POST", "OPTIONS", "PUT")}
    for key in (None, "Bearer x", f"Bearer {at.key[:-1]}", f"Basic {at.key}", at.key):
        headers = {} if key is None else {"Authorization": key}
        with httpx2.Client(base_url=url, trust_env=False, headers=headers) as stranger:
            answers = {route: stranger.request(*route).status_code for route in sorted(routes)}
        assert set(answers.values()) == {401}, answers
    command = psutil.Process(at.pid).cmdline()
    assert at.key and not any(at.key in part for part in command)
    assert at.key not in at.log.read_text(errors="replace")


def test_a_url_where_nothing_answers_is_an_error_within_the_deadline() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    engine = VllmServers([FoundHost(url, startup_timeout_s=2.0)], model="m")
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"no server answers at {url}.*waited 2 s"):
        engine.generate(requests(), SPEC)
    assert time.monotonic() - started < HANG_S


def test_a_server_that_cannot_start_is_an_error_that_quotes_its_log(
    policies: Policies, tmp_path: Path
) -> None:
    at = StartedHost(
        {"model": str(tmp_path / "absent")}, log=tmp_path / "log", startup_timeout_s=800.0
    )
    engine = VllmServers([at], model="m")
    with pytest.raises(EngineError, match=r"did not start: exit code 1[\s\S]*log:[\s\S]*absent"):
        engine.start()
    engine.close()


@server
def test_a_killed_server_is_started_again_and_what_it_owed_is_answered(running: Running) -> None:
    """Killed in the middle of a call of thousands of tokens; the pushed adapter is on the new one.

    Without a restart left, the same is an error that says how it ended and quotes the log.
    """
    running.push(1)
    spec = SamplingSpec(64)
    many = [Request(prompt, tuple(range(40))) for prompt in PROMPTS]
    want = running.engine.generate(many, spec)
    first = host(running)
    pid = first.pid
    assert pid is not None
    children = psutil.Process(pid).children(recursive=True)
    first.restarts_left = 0
    with (
        killed_after(running, 20, pid),
        pytest.raises(EngineError, match=rf"SIGKILL[\s\S]*no restart is left[\s\S]*{first.log}"),
    ):
        running.engine.generate(many, spec)
    assert all(wait_until(lambda c=c: is_gone(c.pid)) for c in children)
    first.restarts_left = 1
    got = running.engine.generate(many, spec)
    assert first.pid not in (None, pid) and first.restarts_left == 0
    assert [[c.ids for c in group] for group in got] == [[c.ids for c in group] for group in want]
    assert_logps_are_the_truth(running, SPEC)


@contextlib.contextmanager
def killed_after(running: Running, answers: int, pid: int) -> Iterator[None]:
    """Kills the server when it has answered so many requests of a call."""
    client, numbers = host(running).client, itertools.count(1)
    complete = client.complete

    def counted(*arguments: Any) -> Any:
        result = complete(*arguments)
        if next(numbers) == answers:
            os.kill(pid, signal.SIGKILL)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "complete", counted)
        yield


def kill_core() -> None:
    [core] = [c for c in psutil.Process().children() if "EngineCore" in " ".join(c.cmdline())]
    core.kill()


@local
@pytest.mark.slow  # another start; who starts again, and with what, is the same as for a server
def test_a_killed_engine_in_process_is_started_again_with_its_policy(running: Running) -> None:
    version = running.push(1)
    kill_core()
    assert_logps_are_the_truth(running, SPEC)
    assert running.engine.version == version


@local
def test_a_killed_engine_in_process_without_a_restart_left_is_an_error(running: Running) -> None:
    """The last test of this engine: it stays dead."""
    running.engine.restarts_left = 0
    kill_core()
    with pytest.raises(EngineError, match=r"subprocess died[\s\S]*No restart is left"):
        running.engine.generate(requests(), SPEC)


def start_in_process(policies: Policies, directory: Path) -> None:
    make_engine("vllm", policies, directory, is_adapter=False).start()


@pytest.mark.slow  # two starts
@pytest.mark.parametrize("sign", ["spawn_main", "EngineCore"])
def test_who_is_killed_while_it_starts_vllm_leaves_nobody_behind(
    policies: Policies, tmp_path: Path, sign: str
) -> None:
    """As soon as its subprocess is there, and when that has a title and loads the model."""
    trainer = fork(start_in_process, policies, tmp_path)  # no daemon, which could have no children
    trainer.start()
    left: list[psutil.Process] = []

    def core_is_there() -> bool:
        left[:] = psutil.Process(trainer.pid).children(recursive=True)
        return any(sign in " ".join(each.cmdline()) for each in left)

    try:
        assert wait_until(core_is_there)
    finally:
        trainer.kill()
        trainer.join()
    assert wait_until(lambda: all(is_gone(each.pid) for each in left), timeout_s=60), left
