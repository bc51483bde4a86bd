"""Many questions to one OpenAI-compatible chat endpoint: bounded, cached on disk, and silent about keys.

Judges use it here and in evaluation; a server of our own (``vllm`` serves the same protocol) is one more
base URL. Requests, retries and their waits are the ``openai`` client's; what an answer is, and when to stop
asking, is decided here, because many servers speak the protocol only nearly.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import logging
import math
import os
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from prefopt.errors import SignalError
from prefopt.signals.chat_replies import Messages, Reply, ReplyCache, parse_reply, reply_key
from prefopt.storage.json_text import half_surrogate

if TYPE_CHECKING:
    from openai import AsyncOpenAI

for _name in ("httpx2", "openai"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # a line a request, thousands a step

_T = TypeVar("_T")

_RETRIED = {408, 409, 425, 429}  # and every 5xx
_FATAL = {401, 402, 403, 404, 405}
_MAX_RETRIES = 1_000_000
"""The deadline ends a request, not their number."""
_OPENAIS_LONGEST_WAIT_S = 120.0
"""The ``openai`` client gives up where an endpoint asks to wait longer."""
_SENT_HEADERS = ("host", "accept", "connection", "content-", "user-agent")


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

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def authorization(self) -> dict[str, str]:
        """The header that holds the key; empty without one. Raises: SignalError for a variable that is not set."""
        key = self._api_key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def redact(self, text: str) -> str:
        """``text`` without the key."""
        key = self._api_key()
        return text.replace(key, "***") if key else text

    def _api_key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise SignalError(
                f"api_key_env = {self.api_key_env!r}: that environment variable is not set; export it, or leave "
                "api_key_env out for an endpoint without keys"
            )
        return key


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
        _check_url(endpoint.base_url)
        endpoint.authorization()  # a missing key is known before the first step

    def complete_all(self, requests: Sequence[Messages]) -> list[Reply | ChatRefused]:
        """A reply to each request, in order, or why the endpoint refuses it.

        Raises: SignalError if an answer is not there by the deadline, or the key, model or URL is refused.
        """
        replies: dict[str, Reply | ChatRefused] = {}
        if self.cache is None:
            keys = [str(number) for number in range(len(requests))]
        else:
            # Under a cache equal requests have one reply, also those that would be under way at the same time.
            keys = [
                reply_key(self.endpoint.model, messages, self.sampling) for messages in requests
            ]
            known = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
            replies |= {key: reply for key, reply in known.items() if reply is not None}
        waiting = {k: each for k, each in zip(keys, requests, strict=True) if k not in replies}
        self._count(cached=len(keys) - len(waiting))
        if waiting:
            replies |= _run(self._ask_all(waiting))
        return [replies[key] for key in keys]

    def report(self) -> dict[str, float]:
        """Counters since construction; tokens are those the endpoint reported, cached replies' not included."""
        with self._lock:
            return dict(self._counts)

    async def _ask_all(self, waiting: Mapping[str, Messages]) -> dict[str, Reply | ChatRefused]:
        from openai import AsyncOpenAI  # as long to import as all of `prefopt check` takes

        todo = iter(waiting.items())
        found: dict[str, Reply | ChatRefused] = {}
        async with _Attempts(self.endpoint, self._count) as http:
            client = AsyncOpenAI(
                api_key="-",  # the real one goes in where the request goes out
                base_url=self.endpoint.base_url,
                timeout=self.endpoint.timeout_s,
                max_retries=_MAX_RETRIES,
                http_client=http,
            )
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.endpoint.concurrency, len(waiting))):
                        workers.create_task(self._work(client, todo, found))
            except ExceptionGroup as failed:  # one failure has cancelled what else was under way
                raise failed.exceptions[0] from None
        return found

    async def _work(
        self,
        client: AsyncOpenAI,
        todo: Iterator[tuple[str, Messages]],
        found: dict[str, Reply | ChatRefused],
    ) -> None:
        for key, messages in todo:
            body = {"model": self.endpoint.model, "messages": list(messages), **self.sampling}
            try:
                reply = found[key] = await self._ask(client, body)
            except ChatRefused as refused:
                self._count(refused=1)
                found[key] = refused
                continue
            self._count(
                prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens
            )
            if self.cache is not None:
                await asyncio.to_thread(self._keep, self.cache, key, reply)

    async def _ask(self, client: AsyncOpenAI, body: Mapping[str, Any]) -> Reply:
        """One request until it is answered, refused, or out of time."""
        limit_s = self.endpoint.deadline_s
        asked = _Asked(end=time.monotonic() + limit_s)
        _asked.set(asked)
        try:
            async with asyncio.timeout(limit_s):
                # Not `chat.completions.create`: it makes objects of an answer's fields, which servers fill freely.
                await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        except TimeoutError:
            raise SignalError(
                f"{self.endpoint.url} (model {self.endpoint.model!r}) did not answer a request within deadline_s "
                f"= {limit_s:g} ({asked.attempts} attempts); last: {asked.problem}. Start or scale the endpoint, "
                "lower concurrency, or raise deadline_s; answers so far are cached"
            ) from None
        assert asked.reply is not None  # `_Attempts` lets no response through without one
        return asked.reply

    def _keep(self, cache: ReplyCache, key: str, reply: Reply) -> None:
        try:
            cache.put(key, reply)
        except OSError as error:
            raise SignalError(
                f"cannot write the judge's cache in {cache.directory}: {error}. Make room, or set cache_dir"
            ) from error

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)


@dataclass
class _Asked:
    """One request under way."""

    end: float
    """Of its time, by `time.monotonic`."""
    attempts: int = 0
    problem: str = "ReadTimeout: no answer"
    """With the last attempt."""
    reply: Reply | None = None


_asked: ContextVar[_Asked] = ContextVar("_asked")


class _Attempts(httpx2.AsyncClient):
    """What the ``openai`` client sends with: every attempt is addressed, bounded and judged here.

    The client sees an answer, or a failure that may pass, which it tries again after a wait. Other errors that
    are raised here go through it as they are.
    """

    def __init__(self, endpoint: Endpoint, count: Callable[..., None]) -> None:
        limits = httpx2.Limits(max_connections=endpoint.concurrency)
        super().__init__(verify=_certificates(), limits=limits)
        self._endpoint = endpoint
        self._count = count

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        asked = _asked.get()
        asked.attempts += 1
        self._count(requests=1, retries=int(asked.attempts > 1))
        # The key is read here and kept nowhere: no repr, pickle or traceback can hold it. What the environment
        # has for OpenAI's own endpoint (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS, …) is not for this one.
        sent = request.headers.items()
        kept = {name: value for name, value in sent if name.startswith(_SENT_HEADERS)}
        request.headers = httpx2.Headers({**kept, **self._endpoint.authorization()})
        try:
            # httpx2 bounds each read, and not their sum.
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await super().send(request, **options)
        except TimeoutError:
            asked.problem = "ReadTimeout: the answer came too slowly"
            raise httpx2.ReadTimeout(asked.problem) from None
        except httpx2.RequestError as error:
            asked.problem = self._endpoint.redact(f"{type(error).__name__}: {error}")
            raise
        await self._judge(response, asked)
        return response

    async def _judge(self, response: httpx2.Response, asked: _Asked) -> None:
        """Returns if the response is an answer, or has a status that the client tries again.

        Raises: ChatRefused; SignalError for a key, model or URL that no retry makes right.
        """
        status = response.status_code
        if status == 200:
            asked.reply = parse_reply(response.content)
            if asked.reply is None:
                asked.problem = "an answer that is no chat completion"
                raise httpx2.DecodingError(asked.problem)
            if (
                half_surrogate(asked.reply.text) is not None
            ):  # asking again at temperature 0 gives it again
                raise ChatRefused("the answer holds half of a surrogate pair, which is no text")
            return
        asked.problem = f"HTTP {status}: {self._endpoint.redact(response.text)[:300].strip()}"
        if status in _RETRIED or status >= 500:
            await self._pace(response.headers, asked)
        elif status in _FATAL or status < 400:
            raise SignalError(
                f"{self._endpoint.url} (model {self._endpoint.model!r}, key from {self._endpoint.api_key_env}) "
                f"refuses: {asked.problem}. Check base_url, model and api_key_env"
            )
        else:
            raise ChatRefused(asked.problem)

    @staticmethod
    async def _pace(headers: httpx2.Headers, asked: _Asked) -> None:
        """Has the client try again, however long it is asked to wait. Raises: TimeoutError if that is too long."""
        wait_s = retry_after_s(headers.get("retry-after"))
        if time.monotonic() + wait_s >= asked.end:
            raise TimeoutError
        if wait_s > _OPENAIS_LONGEST_WAIT_S:
            await asyncio.sleep(wait_s)
            del headers["retry-after"]
        headers["x-should-retry"] = "true"  # also after 425


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: they take longer to load than a server on this machine takes to answer."""
    return httpx2.create_ssl_context()


def _run(asking: Coroutine[Any, Any, _T]) -> _T:
    """The coroutine's result; in a notebook, whose thread has a loop already, by a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asking).result()


def retry_after_s(header: str | None) -> float:
    """Seconds a Retry-After header asks for: a number, or a date; 0 without a usable one."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header)) if math.isfinite(float(header)) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):  # no date, or one that no clock has
        return 0.0


def _check_url(base_url: str) -> None:
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
