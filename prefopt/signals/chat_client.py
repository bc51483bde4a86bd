"""A client of OpenAI-compatible chat endpoints: bounded, retried, cached on disk, and silent about keys.

Judges use it here and in evaluation; a server of our own (``vllm`` serves the same protocol) is one more
base URL.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2

from prefopt.errors import SignalError
from prefopt.storage.cache import atomic_write

logger = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request, thousands a step

Messages = Sequence[Mapping[str, Any]]

_RETRIED = {408, 409, 425, 429}  # and every 5xx
_FATAL = {401, 402, 403, 404, 405}
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 60.0
_KEY_VERSION = 1


class ChatRefused(Exception):
    """The endpoint refuses this one request (HTTP 400, 413, 422): too long for it, or filtered."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently."""

    base_url: str
    """Up to and including the version, e.g. http://localhost:8000/v1."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; None sends no key."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""
    deadline_s: float = 900.0
    """Longest wait for one request with all its retries."""
    concurrency: int = 8
    """Requests under way at a time."""


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    finish_reason: str | None
    """``length``: the answer was cut by max_tokens."""
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    top_logprobs: Mapping[str, float] = field(default_factory=dict)
    """Log-probs (nats) of the likeliest first tokens; empty unless the request asks for them (``logprobs``)."""


class ReplyCache:
    """Replies on disk, one file each, shared by processes and runs; a kill leaves whole files only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # `atomic_write` reads the umask by setting it, which two threads must not do at once
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """The reply, or None: a file that cannot be read is asked for again and replaced."""
        try:
            reply = Reply(**json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return replace(reply, cached=True)

    def put(self, key: str, reply: Reply) -> None:
        """Raises: OSError if it cannot be written."""
        with self._lock, atomic_write(self._path(key)) as file:
            file.write_text(json.dumps(asdict(reply)), encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


class ChatClient:
    """Asks one endpoint, many requests at a time.

    Args:
        sampling: what goes into every request beside model and messages (``temperature``, ``max_tokens``).
        cache: where replies are kept; None asks every time.

    Raises: SignalError if the key's variable is not set, or the URL holds a key itself.
    """

    def __init__(
        self, endpoint: Endpoint, sampling: Mapping[str, Any], cache: ReplyCache | None
    ) -> None:
        self.endpoint = endpoint
        self.sampling = dict(sampling)
        self.cache = cache
        self._counts: Counter[str] = Counter(
            dict.fromkeys(
                ("requests", "retries", "cached", "refused", "prompt_tokens", "completion_tokens"),
                0,
            )
        )
        self._lock = threading.Lock()
        self._url = _completions_url(endpoint.base_url)
        self._headers()  # a missing key is known before the first step
        self._client = httpx2.Client(
            timeout=endpoint.timeout_s,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )

    def complete_all(self, requests: Sequence[Messages]) -> list[Reply | ChatRefused]:
        """A reply to each request, in order, or why the endpoint refuses it.

        Raises: SignalError if an answer is not there by the deadline, or the key, model or URL is refused.
        """
        if not requests:
            return []
        if self.cache is None:
            return self._complete_at_once(requests)
        # Under a cache equal requests have one reply, also those that are under way at the same time.
        keys = [_key(self.endpoint.model, messages, self.sampling) for messages in requests]
        distinct = dict(zip(keys, requests, strict=True))
        replies = dict(zip(distinct, self._complete_at_once([*distinct.values()]), strict=True))
        self._count(cached=len(keys) - len(distinct))
        return [replies[key] for key in keys]

    def _complete_at_once(self, requests: Sequence[Messages]) -> list[Reply | ChatRefused]:
        stop = threading.Event()
        threads = ThreadPoolExecutor(min(self.endpoint.concurrency, len(requests)))
        try:
            return list(threads.map(lambda messages: self._complete(messages, stop), requests))
        finally:  # after an error or Ctrl-C nobody waits for the other answers
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)

    def report(self) -> dict[str, float]:
        """Counters since construction; tokens are those the endpoint reported, cached replies' not included."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._client.close()

    def _complete(self, messages: Messages, stop: threading.Event) -> Reply | ChatRefused:
        key = _key(self.endpoint.model, messages, self.sampling)
        cached = self.cache.get(key) if self.cache is not None else None
        if cached is not None:
            self._count(cached=1)
            return cached
        body = {"model": self.endpoint.model, "messages": list(messages), **self.sampling}
        try:
            reply = self._ask(body, stop)
        except ChatRefused as refused:
            self._count(refused=1)
            return refused
        self._count(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        if self.cache is not None:
            self._keep(self.cache, key, reply)
        return reply

    def _keep(self, cache: ReplyCache, key: str, reply: Reply) -> None:
        try:
            cache.put(key, reply)
        except OSError as error:
            raise SignalError(
                f"cannot write the judge's cache in {cache.directory}: {error}. Make room, or set cache_dir"
            ) from error

    def _ask(self, body: Mapping[str, Any], stop: threading.Event) -> Reply:
        """One request until it is answered, refused, or out of time."""
        end = time.monotonic() + self.endpoint.deadline_s
        attempt = 0
        while True:
            attempt += 1
            self._count(requests=1, retries=int(attempt > 1))
            problem, wait_s = self._try(body, end)
            if isinstance(problem, Reply):
                return problem
            # Half fixed, half random: clients that failed together do not come back together.
            delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (attempt - 1))
            delay = max(wait_s, delay * random.uniform(0.5, 1.0))
            if time.monotonic() + delay >= end or stop.wait(delay):
                raise SignalError(
                    f"{self._url} (model {self.endpoint.model!r}) did not answer a request within deadline_s = "
                    f"{self.endpoint.deadline_s:g} ({attempt} attempts); last: {problem}. Start or scale the "
                    "endpoint, lower concurrency, or raise deadline_s; answers so far are cached"
                )

    def _try(self, body: Mapping[str, Any], end: float) -> tuple[Reply | str, float]:
        """``(reply, 0)``, or ``(what went wrong, seconds the endpoint asks to wait)``.

        Raises: ChatRefused, or SignalError for a key, model or URL that no retry makes right.
        """
        give_up = min(end, time.monotonic() + self.endpoint.timeout_s)
        try:
            status, headers, content = self._post(body, give_up)
        except httpx2.TransportError as error:
            return f"{type(error).__name__}: {self._redact(str(error))}", 0.0
        if status == 200:
            reply = _reply(content)
            return (reply or "an answer that is no chat completion"), 0.0
        detail = f"HTTP {status}: {self._redact(content.decode(errors='replace'))[:300].strip()}"
        if status in _RETRIED or status >= 500:
            return detail, retry_after_s(headers.get("retry-after"))
        if status in _FATAL or status < 400:
            raise SignalError(
                f"{self._url} (model {self.endpoint.model!r}, key from {self.endpoint.api_key_env}) refuses: "
                f"{detail}. Check base_url, model and api_key_env"
            )
        raise ChatRefused(detail)

    def _post(
        self, body: Mapping[str, Any], give_up: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body. Streamed, because httpx bounds each read and not their sum."""
        wait = max(0.01, give_up - time.monotonic())
        content = b""
        with self._client.stream(
            "POST", self._url, json=body, headers=self._headers(), timeout=wait
        ) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > give_up:
                    raise httpx2.ReadTimeout("the answer came too slowly")
        return response.status_code, response.headers, content

    def _headers(self) -> dict[str, str]:
        key = self._api_key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _api_key(self) -> str | None:
        """Read at every use and kept nowhere: no repr, pickle or traceback of ours can hold it."""
        name = self.endpoint.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise SignalError(
                f"api_key_env = {name!r}: that environment variable is not set; export it, or leave "
                "api_key_env out for an endpoint without keys"
            )
        return key

    def _redact(self, text: str) -> str:
        key = self._api_key()
        return text.replace(key, "***") if key else text

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)


def retry_after_s(header: str | None) -> float:
    """Seconds a Retry-After header asks for: a number, or a date; 0 without a usable one."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _completions_url(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise SignalError(f"base_url = {base_url!r}: {error}") from error
    if url.userinfo or url.query:
        raise SignalError(
            "base_url: holds a user name, password or query, which would end up in logs; keys belong into "
            "the environment variable that api_key_env names"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise SignalError(f"base_url = {base_url!r}: must be like http://localhost:8000/v1")
    return f"{base_url.rstrip('/')}/chat/completions"


def _reply(content: bytes) -> Reply | None:
    """The reply in a chat completion; None if it is none (a proxy's page, say)."""
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        usage = data.get("usage") or {}
        return Reply(
            text=str(choice["message"].get("content") or ""),
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            top_logprobs=_first_token(choice.get("logprobs")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _first_token(logprobs: Any) -> dict[str, float]:
    """Log-prob by token of the first position; of two tokens that read alike the likelier. Empty if none came.

    Another protocol's shape is none, too: whoever needs log-probs counts that, and no retry would change it.
    """
    found: dict[str, float] = {}
    try:
        for top in logprobs["content"][0]["top_logprobs"]:
            token, value = str(top["token"]), float(top["logprob"])
            found[token] = max(value, found.get(token, value))
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    return found


def _key(model: str, messages: Messages, sampling: Mapping[str, Any]) -> str:
    content = [_KEY_VERSION, model, list(map(dict, messages)), dict(sampling)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
