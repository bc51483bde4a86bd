"""Talking to one vLLM server: token ids in and out over ``/v1/completions``, policies over its endpoints.

httpx2 and not a client of OpenAI's: it is what huggingface_hub, and so transformers, already brings along.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import httpx2

from prefopt.engines.base import Completion, SamplingSpec
from prefopt.engines.vllm.answers import (
    ModelCard,
    read_completion,
    read_logprobs,
    read_model,
    read_object,
)
from prefopt.engines.vllm.door import bearer
from prefopt.engines.vllm.local import sampling_parameters
from prefopt.errors import EngineError
from prefopt.shown import redacted
from prefopt.storage.http_body import BodyTooLarge, read_body

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request, thousands a step

MAX_CONNECTIONS = 128
"""Requests in flight to one server; vLLM batches them."""

_CONNECT_S = 10.0
_UNAVAILABLE = (429, 502, 503, 504)
_COMPLETIONS = "/v1/completions"
_MOST_BYTES = 256 * 2**20
"""Of one answer: log-probs of a prompt of a million tokens are 100 MiB."""

_T = TypeVar("_T")


class ConnectionLost(Exception):
    """The server was not reached, or went away before it answered: the request may be sent again."""


class ServerClient:
    """HTTP client of one server; its methods may be called from many threads.

    Every request is bounded as a whole, however slowly the server sends its answer: one thread of the client's own
    sends them all, on an event loop, where a wait can be ended at any point.

    Args:
        url: e.g. http://node7:8000, with or without ``/v1``. A user and password in it, and its query, go with
            every request; what messages call the server has neither.
        through_proxy: honour HTTP_PROXY and the like; not for a server on this machine.
        key: what it asks for, if anything.
    """

    def __init__(self, url: str, *, through_proxy: bool, key: str | None = None) -> None:
        base, _, query = url.partition("?")
        base = base.rstrip("/").removesuffix("/v1")
        self.url = redacted(base)
        self._loop = _LoopThread()
        self._http = httpx2.AsyncClient(
            base_url=base,
            params=httpx2.QueryParams(query),
            headers={"Authorization": bearer(key)} if key else {},
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS),
            trust_env=through_proxy,
        )

    def is_healthy(self, timeout_s: float = 5.0) -> bool:
        """Does it answer ``/health``?"""
        try:
            return self._exchange("GET", "/health", None, timeout_s).status_code == 200
        except (httpx2.RequestError, TimeoutError, BodyTooLarge, OSError):
            return False

    def model(self, deadline: float) -> ModelCard:
        """The full model it serves. Raises: EngineError, ConnectionLost."""
        path = "/v1/models"
        answer = self._object(self._request("GET", path, None, deadline), path)
        with self._expected(path):
            return read_model(answer)

    def complete(
        self,
        model: str,
        prompt_ids: Sequence[int],
        spec: SamplingSpec,
        seed: int,
        deadline: float,
        vocab_size: int | None = None,
    ) -> Completion:
        """One sampled response, of token ids below ``vocab_size``. Raises: EngineError, ConnectionLost."""
        body = {"model": model, "prompt": list(prompt_ids), **sampling_parameters(spec, seed)}
        answer = self._completion(body, deadline)
        with self._expected(_COMPLETIONS):
            return read_completion(answer, model, prompt_ids, spec, vocab_size)

    def score(
        self, model: str, prompt: Sequence[int], response: Sequence[int], deadline: float
    ) -> list[float]:
        """Log-probs of ``response`` at temperature 1. Raises: EngineError, ConnectionLost."""
        body = {"model": model, "prompt": [*prompt, *response], "max_tokens": 1}
        answer = self._completion({**body, "prompt_logprobs": 0}, deadline)
        with self._expected(_COMPLETIONS):
            return read_logprobs(answer, model, prompt, response)

    def post_object(
        self, path: str, body: dict[str, Any] | None, deadline: float
    ) -> dict[str, Any]:
        """The JSON object that answers a POST. Raises: as `post`; EngineError for another answer."""
        return self._object(self.post(path, body, deadline), path)

    def post(self, path: str, body: dict[str, Any] | None, deadline: float) -> httpx2.Response:
        """The answer to a POST. Raises: EngineError with what the server says; ConnectionLost."""
        return self._request("POST", path, body, deadline)

    def close(self) -> None:
        self._loop.close(self._http.aclose)

    def _completion(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        common = {
            # what the server would otherwise take from the model's generation_config
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # needs no tokenizer
        }
        return self.post_object(_COMPLETIONS, {**common, **body}, deadline)

    def _object(self, response: httpx2.Response, path: str) -> dict[str, Any]:
        with self._expected(path):
            return read_object(response.content, response.headers.get("content-type"))

    @contextlib.contextmanager
    def _expected(self, path: str) -> Iterator[None]:
        """Turns what an answer of another shape raises into an EngineError that says who gave it."""
        try:
            yield
        except ValueError as error:
            raise EngineError(
                f"{self.url}{path} answers otherwise than vLLM does: {str(error)[:300]}. Is it a vLLM server, of "
                "0.11 or newer, and nothing between that changes its answers?"
            ) from error

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, deadline: float
    ) -> httpx2.Response:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            response = self._exchange(method, path, body, left)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout) as error:
            raise EngineError(
                f"{self.url}{path} did not answer in time ({type(error).__name__}). Raise engine.timeout_s, "
                "or look at the server's log"
            ) from error
        except (httpx2.TransportError, OSError) as error:
            raise ConnectionLost(f"{type(error).__name__}: {error}") from error
        except (
            httpx2.RequestError,
            BodyTooLarge,
        ) as error:  # a body that does not decompress, or never ends
            raise EngineError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        except httpx2.InvalidURL as error:
            raise EngineError(f"engine.urls: {self.url!r} is no URL: {error}") from error
        status = response.status_code
        if status in _UNAVAILABLE:
            raise ConnectionLost(f"HTTP {status}")
        if not 200 <= status < 300:
            raise EngineError(f"{self.url}{path}: HTTP {status}: {_refusal(response)}")
        return response

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
    ) -> httpx2.Response:
        """Request and whole answer. Raises: TimeoutError, BodyTooLarge; httpx2's errors."""
        connect_s = min(timeout_s, _CONNECT_S)

        async def exchange() -> httpx2.Response:
            request = self._http.build_request(
                method, path, json=body, timeout=httpx2.Timeout(timeout_s, connect=connect_s)
            )
            async with asyncio.timeout(timeout_s):
                return await read_body(await self._http.send(request, stream=True), _MOST_BYTES)

        return self._loop.run(exchange())


class _LoopThread:
    """An event loop in a thread of its own, started by the first who needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result, to any thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="vllm-client", daemon=True
                )
                self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a signal ended the wait: nobody wants the answer
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Ends the thread, after ``last``; nothing to do where nobody needed it."""
        if self._loop is None or self._thread is None:
            return
        self.run(last())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None


def _refusal(response: httpx2.Response) -> str:
    """What a server says that does not do as it was asked, and what helps."""
    status, said = response.status_code, response.text[:600].strip()
    if status < 400:
        where = response.headers.get("location", "nowhere")
        return f"it sends to {where[:200]}, which is not followed. Set engine.urls to where the server is"
    if status in (401, 403):
        return f"{said}. It wants a key: export VLLM_API_KEY, or ask who runs it"
    return said
