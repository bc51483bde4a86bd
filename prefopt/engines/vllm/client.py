"""Talking to one vLLM server: token ids in and out over ``/v1/completions``, policies over its endpoints.

httpx2 and not a client of OpenAI's: it is what huggingface_hub, and so transformers, already brings along.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from prefopt.engines.base import Completion, SamplingSpec
from prefopt.engines.vllm.local import sampling_parameters
from prefopt.errors import EngineError

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request, thousands a step

MAX_CONNECTIONS = 128
"""Requests in flight to one server; vLLM batches them."""

_CONNECT_S = 10.0
_UNAVAILABLE = (502, 503, 504)


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
        url: e.g. http://node7:8000, with or without ``/v1``.
        through_proxy: honour HTTP_PROXY and the like; not for a server on this machine.
    """

    def __init__(self, url: str, *, through_proxy: bool) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")  # what vLLM itself reads, where it asks for one
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS),
            trust_env=through_proxy,
        )

    def is_healthy(self, timeout_s: float = 5.0) -> bool:
        """Does it answer ``/health``?"""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == 200
        except (httpx2.TransportError, OSError):
            return False

    def model(self, deadline: float) -> ModelCard:
        """The full model it serves. Raises: EngineError, ConnectionLost."""
        answer = self._request("GET", "/v1/models", None, deadline).json()
        card = next(card for card in answer["data"] if not card.get("parent"))
        return ModelCard(card["id"], card.get("root") or card["id"], card.get("max_model_len"))

    def complete(
        self, model: str, prompt_ids: Sequence[int], spec: SamplingSpec, seed: int, deadline: float
    ) -> Completion:
        """One sampled response. Raises: EngineError, ConnectionLost."""
        choice = self._completion(
            {"model": model, "prompt": list(prompt_ids), **sampling_parameters(spec, seed)},
            deadline,
        )
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if ids is None or logprobs is None:
            raise EngineError(
                f"{self.url} returns no token ids or log-probs: it is no vLLM server, or an old one (0.11 or "
                "newer is needed)"
            )
        reason = "eos" if choice["finish_reason"] == "stop" else "length"
        return Completion(tuple(ids), tuple(logprobs["token_logprobs"]), reason)

    def score(
        self, model: str, prompt: Sequence[int], response: Sequence[int], deadline: float
    ) -> list[float]:
        """Log-probs of ``response`` at temperature 1. Raises: EngineError, ConnectionLost."""
        body = {"model": model, "prompt": [*prompt, *response], "max_tokens": 1}
        rows = self._completion({**body, "prompt_logprobs": 0}, deadline)["prompt_logprobs"]
        return [
            float(rows[len(prompt) + i][str(token)]["logprob"]) for i, token in enumerate(response)
        ]

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
        return self.post("/v1/completions", {**common, **body}, deadline).json()["choices"][0]

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
        except httpx2.InvalidURL as error:
            raise EngineError(f"engine.urls: {self.url!r} is no URL: {error}") from error
        if response.status_code in _UNAVAILABLE:
            raise ConnectionLost(f"HTTP {response.status_code}")
        if response.status_code >= 400:
            raise EngineError(
                f"{self.url}{path}: HTTP {response.status_code}: {response.text[:600]}"
            )
        return response
