"""The two kinds of server: one we start, watch, restart and stop, and one that is found at a URL."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from prefopt.engines.child import (
    GuardedProcess,
    clean_environment,
    describe_exit,
    free_port,
    log_tail,
    wait_briefly,
)
from prefopt.engines.vllm.client import ServerClient
from prefopt.engines.vllm.door import KEY_VARIABLE, MIDDLEWARE
from prefopt.engines.vllm.settings import (
    command_line,
    engine_environment,
    require_vllm,
    starting_text,
)
from prefopt.errors import EngineError
from prefopt.report.bars import waiting

logger = logging.getLogger(__name__)

_LONGEST_BACKOFF_S = 8.0
# A server that dies closes its connections a moment before its process ends.
_LAST_BREATH_S = 5.0
_PORT_ATTEMPTS = 3


class Host(Protocol):
    """Where a vLLM server runs."""

    client: ServerClient

    def begin(self) -> None:
        """Sets off the start, without waiting for it."""
        ...

    def wait_until_ready(self) -> None:
        """Returns when the server answers. Raises: EngineError if it does not in time, or dies."""
        ...

    def recover(self, attempt: int, deadline: float, reason: str) -> None:
        """After a lost connection: returns when it is worth trying again. Raises: EngineError if never."""
        ...

    def close(self) -> None: ...


class StartedHost:
    """A server of our own on this machine.

    Args:
        arguments: vLLM engine arguments.
        log: file its output goes to.
        startup_timeout_s: longest wait for it to be ready.
        max_restarts: times it is started again after it died.
        environment: variables on top, e.g. CUDA_VISIBLE_DEVICES.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        startup_timeout_s: float = 900.0,
        max_restarts: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments = dict(arguments)
        self.log = log
        self.startup_timeout_s = startup_timeout_s
        self.restarts_left = max_restarts
        self.environment = dict(environment or {})
        self.client: ServerClient = None  # type: ignore[assignment]  (there is no port yet)
        self.key = ""
        """What the server asks for on every route; another at every start, and in no file."""
        self._process: GuardedProcess | None = None

    @property
    def pid(self) -> int | None:
        """Of the server's API process, if it runs."""
        return None if self._process is None else self._process.pid

    def begin(self) -> None:
        require_vllm("vllm_server")
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--middleware", MIDDLEWARE]
        command += command_line(self.arguments)
        self.key = secrets.token_urlsafe(32)
        adapters = bool(self.arguments.get("enable_lora"))
        extra = {
            **engine_environment(quiet=False),
            # Each opens what this run's pushes need and no more, to who has the key, on this machine.
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(int(adapters)),
            "VLLM_SERVER_DEV_MODE": str(int(not adapters)),
            **self.environment,
            KEY_VARIABLE: self.key,
        }
        self.client = ServerClient(f"http://127.0.0.1:{port}", through_proxy=False, key=self.key)
        self._process = GuardedProcess(command, clean_environment(extra), self.log)

    def wait_until_ready(self) -> None:
        for attempt in range(_PORT_ATTEMPTS):
            code = self._wait()
            if code is None:
                return
            tail = log_tail(self.log)
            if "address already in use" not in tail.lower() or attempt == _PORT_ATTEMPTS - 1:
                raise EngineError(f"the vLLM server did not start: {describe_exit(code)}; {tail}")
            self.close()
            self.begin()  # the port was taken between our look and its bind

    def recover(self, attempt: int, deadline: float, reason: str) -> None:
        assert self._process is not None
        last = min(deadline, time.monotonic() + _LAST_BREATH_S)
        while self._process.poll() is None and wait_briefly(last):
            if self.client.is_healthy():
                return
        code = self._process.poll()
        ended = "its process does not answer" if code is None else describe_exit(code)
        if self.restarts_left <= 0:
            raise EngineError(
                f"the vLLM server died ({ended}; {reason}) and no restart is left (engine.max_restarts); "
                f"{log_tail(self.log)}"
            )
        self.restarts_left -= 1
        logger.warning(
            "the vLLM server died (%s); starting it again (%d restarts left); its log: %s",
            ended, self.restarts_left, self.log,
        )  # fmt: skip
        self.close()
        self.begin()
        self.wait_until_ready()

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None
            self.client.close()

    def _wait(self) -> int | None:
        """None once the server is healthy, its exit code if it ended."""
        assert self._process is not None
        deadline = time.monotonic() + self.startup_timeout_s
        what = starting_text(self.arguments)
        with waiting(what, detail=lambda: f"; its log: {self.log}"):
            return self._wait_until(deadline)

    def _wait_until(self, deadline: float) -> int | None:
        assert self._process is not None
        while (code := self._process.poll()) is None:
            if self.client.is_healthy():
                return None
            if not wait_briefly(deadline):
                tail = log_tail(self.log)
                self.close()
                raise EngineError(
                    f"waited {self.startup_timeout_s:g} s for the vLLM server to start. Raise "
                    f"engine.startup_timeout_s; {tail}"
                )
        return code


class FoundHost:
    """A server that someone else started, at ``url``; it is waited for, and never stopped.

    Where it asks for a key, that is VLLM_API_KEY of this process's environment.

    Args:
        startup_timeout_s: longest wait for it to answer for the first time.
    """

    def __init__(self, url: str, *, startup_timeout_s: float = 900.0) -> None:
        key = os.environ.get(KEY_VARIABLE)
        self.client = ServerClient(url, through_proxy=True, key=key)
        self.startup_timeout_s = startup_timeout_s

    def begin(self) -> None:
        pass

    def wait_until_ready(self) -> None:
        with waiting(f"vLLM: waiting for the server at {self.client.url}"):
            self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + self.startup_timeout_s
        attempt = 0
        while not self.client.is_healthy():
            if not wait_briefly(deadline, _backoff_s(attempt)):
                raise EngineError(
                    f"engine.urls: no server answers at {self.client.url} (waited {self.startup_timeout_s:g} s). "
                    "Start it, or leave engine.urls out and the run starts one"
                )
            attempt += 1

    def recover(self, attempt: int, deadline: float, reason: str) -> None:
        if not wait_briefly(deadline, _backoff_s(attempt)):
            raise EngineError(
                f"engine.urls: the connection to {self.client.url} was lost and not found again within "
                f"engine.timeout_s ({reason})"
            )
        logger.warning("trying %s again (%s)", self.client.url, reason)

    def close(self) -> None:
        self.client.close()


def _backoff_s(attempt: int) -> float:
    return min(0.25 * 2**attempt, _LONGEST_BACKOFF_S)
