"""Talking to one vLLM server: token ids in and out over ``/v1/completions``, policies over its endpoints.

httpx2 and not a client of OpenAI's: it is what huggingface_hub, and so transformers, already brings along.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from prefopt.engines.base import Completion, SamplingSpec
from prefopt.engines.vllm.door import bearer
from prefopt.engines.vllm.local import sampling_parameters
from prefopt.errors import EngineError
from prefopt.shown import redacted
from prefopt.storage.json_text import parse_json

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request, thousands a step

MAX_CONNECTIONS = 128
"""Requests in flight to one server; vLLM batches them."""

_CONNECT_S = 10.0
_UNAVAILABLE = (502, 503, 504)


_COMPLETIONS = "/v1/completions"
_FINISHED: dict[str, Literal["eos", "length"]] = {"stop": "eos", "length": "length"}


class ConnectionLost(Exception):
    """The server was not reached, or went away before it answered: the request may be sent again."""


@dataclass(frozen=True)
class ModelCard:
    """A full model that a server serves, of ``/v1/models``."""

    id: str
    root: str
    max_model_len: int | None


class ServerClient:
    """HTTP client of one server; its methods may be called from many threads.

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
        self._http = httpx2.Client(
            base_url=base,
            params=httpx2.QueryParams(query),
            headers={"Authorization": bearer(key)} if key else {},
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS),
            trust_env=through_proxy,
        )

    def is_healthy(self, timeout_s: float = 5.0) -> bool:
        """Does it answer ``/health``?"""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == 200
        except (httpx2.RequestError, OSError):
            return False

    def model(self, deadline: float) -> ModelCard:
        """The full model it serves. Raises: EngineError, ConnectionLost."""
        path = "/v1/models"
        answer = self._object(self._request("GET", path, None, deadline), path)
        with self._expected(path):
            card = next(card for card in answer["data"] if not card.get("parent"))
            name, root, longest = card["id"], card.get("root"), card.get("max_model_len")
            if not isinstance(name, str) or not isinstance(longest, int | None):
                raise TypeError(f"id is {name!r}, max_model_len {longest!r}")
        return ModelCard(name, str(root or name), longest)

    def complete(
        self, model: str, prompt_ids: Sequence[int], spec: SamplingSpec, seed: int, deadline: float
    ) -> Completion:
        """One sampled response. Raises: EngineError, ConnectionLost."""
        choice = self._completion(
            {"model": model, "prompt": list(prompt_ids), **sampling_parameters(spec, seed)},
            deadline,
        )
        if choice.get("token_ids") is None or choice.get("logprobs") is None:
            raise EngineError(
                f"{self.url} returns no token ids or log-probs: it is no vLLM server, or an old one (0.11 or "
                "newer is needed)"
            )
        with self._expected(_COMPLETIONS):
            ids = tuple(map(_token_id, choice["token_ids"]))
            logprobs = tuple(map(_logprob, choice["logprobs"]["token_logprobs"]))
            if len(ids) != len(logprobs):
                raise ValueError(f"{len(ids)} token ids and {len(logprobs)} log-probs")
            reason = _FINISHED[choice["finish_reason"]]
        return Completion(ids, logprobs, reason)

    def score(
        self, model: str, prompt: Sequence[int], response: Sequence[int], deadline: float
    ) -> list[float]:
        """Log-probs of ``response`` at temperature 1. Raises: EngineError, ConnectionLost."""
        body = {"model": model, "prompt": [*prompt, *response], "max_tokens": 1}
        choice = self._completion({**body, "prompt_logprobs": 0}, deadline)
        with self._expected(_COMPLETIONS):
            rows = choice["prompt_logprobs"]
            return [
                _logprob(rows[len(prompt) + i][str(token)]["logprob"])
                for i, token in enumerate(response)
            ]

    def post_object(
        self, path: str, body: dict[str, Any] | None, deadline: float
    ) -> dict[str, Any]:
        """The JSON object that answers a POST. Raises: as `post`; EngineError for another answer."""
        return self._object(self.post(path, body, deadline), path)

    def post(self, path: str, body: dict[str, Any] | None, deadline: float) -> httpx2.Response:
        """The answer to a POST. Raises: EngineError with what the server says; ConnectionLost."""
        return self._request("POST", path, body, deadline)

    def close(self) -> None:
        self._http.close()

    def _completion(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        common = {
            # what the server would otherwise take from the model's generation_config
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # needs no tokenizer
        }
        answer = self.post_object(_COMPLETIONS, {**common, **body}, deadline)
        with self._expected(_COMPLETIONS):
            choice = answer["choices"][0]
            if not isinstance(choice, dict):
                raise TypeError(f"a choice that is {type(choice).__name__}")
        return choice

    def _object(self, response: httpx2.Response, path: str) -> dict[str, Any]:
        with self._expected(path):
            found = parse_json(response.content.decode("utf-8"), twice=True)
            if not isinstance(found, dict):
                raise TypeError(f"JSON that is {type(found).__name__}")
        return found

    @contextlib.contextmanager
    def _expected(self, path: str) -> Iterator[None]:
        """Turns what an answer of another shape raises into an EngineError that says who gave it."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
            raise EngineError(
                f"{self.url}{path} answers otherwise than vLLM does ({type(error).__name__}: {str(error)[:200]}). "
                "Is it a vLLM server, and of a version that is known here?"
            ) from error

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, deadline: float
    ) -> httpx2.Response:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            response = self._http.request(
                method, path, json=body, timeout=httpx2.Timeout(left, connect=min(left, _CONNECT_S))
            )
        except (httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout) as error:
            raise EngineError(
                f"{self.url}{path} did not answer in time ({type(error).__name__}). Raise engine.timeout_s, "
                "or look at the server's log"
            ) from error
        except (httpx2.TransportError, OSError) as error:
            raise ConnectionLost(f"{type(error).__name__}: {error}") from error
        except httpx2.RequestError as error:  # a body that does not decompress
            raise EngineError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        except httpx2.InvalidURL as error:
            raise EngineError(f"engine.urls: {self.url!r} is no URL: {error}") from error
        if response.status_code in _UNAVAILABLE:
            raise ConnectionLost(f"HTTP {response.status_code}")
        if response.status_code >= 400:
            raise EngineError(
                f"{self.url}{path}: HTTP {response.status_code}: {response.text[:600]}"
            )
        return response


def _token_id(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
        return value
    raise ValueError(f"{str(value)[:40]!r} is no token id")


def _logprob(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{str(value)[:40]!r} is no log-prob")
