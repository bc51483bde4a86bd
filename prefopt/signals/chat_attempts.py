"""One attempt at a chat endpoint: where it goes, what bounds it, and what its answer means.

Requests and the waits between attempts are the ``openai`` client's, which sends with `Attempts`.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import math
import os
import ssl
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2

from prefopt.errors import SignalError
from prefopt.signals.chat_replies import Reply, no_reply, parse_reply
from prefopt.storage.http_body import BodyTooLarge, read_body
from prefopt.storage.json_text import half_surrogate

_RETRIED = {408, 409, 425, 429}  # and every 5xx
_KEY_REFUSED = {401, 402, 407}
"""Said of the key, or of who pays: no other request fares better."""
_HERE_REFUSED = {403, 404, 405}
"""Said of a wrong URL, model or key; gateways also say 403 of a single request's content."""
_OPENAIS_LONGEST_WAIT_S = 120.0
"""The ``openai`` client gives up where an endpoint asks to wait longer."""
_SENT_HEADERS = ("host", "accept", "connection", "content-", "user-agent")
_MOST_BYTES = 32 * 2**20
"""Of one answer. The longest that models give, with log-probs, are a hundredth of it."""
_BLANK_ATTEMPTS = 3
"""Answers without a choice, until the request is given up: asked again, most models give the same."""


class ChatRefused(Exception):
    """The endpoint answers others and not this request: too long for it, filtered, or never answered."""


class Unanswered(SignalError):
    """A request that got no answer, which may be its own fault or the endpoint's: who knows of others decides.

    Args:
        message: for the case that it is the endpoint's.
        reason: for the case that it is the request's.
        reached: whether anybody was there at the last attempt.
    """

    def __init__(self, message: str, reason: str, *, reached: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.reached = reached


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
        if not (key.isascii() and key.isprintable()):
            raise SignalError(
                f"api_key_env = {self.api_key_env!r}: what that environment variable holds is no key: it has "
                "characters that no HTTP header can carry (a line break, a letter outside ASCII); export the key "
                "alone"
            )
        return key


@dataclass
class Asked:
    """One request under way."""

    end: float
    """Of its time, by `time.monotonic`."""
    attempts: int = 0
    problem: str = "ReadTimeout: no answer"
    """With the last attempt."""
    reached: bool = True
    """Whether a server was there at the last attempt, whatever it said."""
    num_blank: int = 0
    """Answers without a choice."""
    reply: Reply | None = None


asked_now: ContextVar[Asked] = ContextVar("asked_now")


class Attempts(httpx2.AsyncClient):
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
        asked = asked_now.get()
        asked.attempts += 1
        self._count(requests=1, retries=int(asked.attempts > 1))
        # The key is read here and kept nowhere: no repr, pickle or traceback can hold it. What the environment
        # has for OpenAI's own endpoint (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS, …) is not for this one.
        sent = request.headers.items()
        kept = {name: value for name, value in sent if name.startswith(_SENT_HEADERS)}
        request.headers = httpx2.Headers({**kept, **self._endpoint.authorization()})
        asked.reached = True
        try:
            # httpx2 bounds each read, and not their sum.
            async with asyncio.timeout(self._endpoint.timeout_s):
                streamed = await super().send(request, **{**options, "stream": True})
                response = await read_body(streamed, _MOST_BYTES)
        except TimeoutError:
            asked.problem = "ReadTimeout: the answer came too slowly"
            raise httpx2.ReadTimeout(asked.problem) from None
        except BodyTooLarge as error:
            self._blank(asked, f"an answer that is no chat completion: {error}")
        except httpx2.RequestError as error:
            asked.reached = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            asked.problem = self._endpoint.redact(f"{type(error).__name__}: {error}")
            raise
        await self._judge(response, asked)
        return response

    async def _judge(self, response: httpx2.Response, asked: Asked) -> None:
        """Returns if the response is an answer, or has a status that the client tries again.

        Raises: ChatRefused; SignalError for a key that is refused; Unanswered for what is refused with the URL,
            or has no choice however often it is asked.
        """
        status = response.status_code
        if status == 200:
            self._read(response, asked)
            return
        asked.problem = f"HTTP {status}: {self._endpoint.redact(response.text)[:300].strip()}"
        if status in _RETRIED or status >= 500:
            await self._pace(response.headers, asked)
        elif status in _KEY_REFUSED:
            raise SignalError(self._refusal(asked))
        elif status in _HERE_REFUSED or status < 400:
            if location := response.headers.get("location"):
                asked.problem += f" (it sends to {location[:200]}, which is not followed)"
            raise Unanswered(self._refusal(asked), asked.problem, reached=True)
        else:
            raise ChatRefused(asked.problem)

    def _refusal(self, asked: Asked) -> str:
        return (
            f"{self._endpoint.url} (model {self._endpoint.model!r}, key from {self._endpoint.api_key_env}) "
            f"refuses: {asked.problem}. Check base_url, model and api_key_env"
        )

    def _read(self, response: httpx2.Response, asked: Asked) -> None:
        asked.reply = parse_reply(response.content)
        if asked.reply is None:
            what, is_blank = no_reply(response.content, response.headers.get("content-type"))
            what = self._endpoint.redact(f"an answer that is no chat completion: {what}")
            if is_blank:
                self._blank(asked, what)
            asked.problem = what
            raise httpx2.DecodingError(what)
        if half_surrogate(asked.reply.text) is not None:  # at temperature 0 it would come again
            raise ChatRefused("the answer holds half of a surrogate pair, which is no text")

    def _blank(self, asked: Asked, what: str) -> None:
        """Raises: Unanswered after some of these, until then what the client tries again."""
        asked.problem = what
        asked.num_blank += 1
        if asked.num_blank < _BLANK_ATTEMPTS:
            raise httpx2.DecodingError(what)
        raise Unanswered(
            f"{self._endpoint.url} (model {self._endpoint.model!r}) answers no request ({asked.attempts} attempts "
            f"at the first); last: {what}. Check base_url and model, and the endpoint's log",
            what,
            reached=True,
        )

    @staticmethod
    async def _pace(headers: httpx2.Headers, asked: Asked) -> None:
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


def check_url(base_url: str) -> None:
    """Raises: SignalError for what is no URL of an endpoint, or holds a key itself."""
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
