"""Many questions to one OpenAI-compatible chat endpoint: bounded, cached on disk, and silent about keys.

Judges use it here and in evaluation; a server of our own (``vllm`` serves the same protocol) is one more
base URL. Requests, retries and their waits are the ``openai`` client's; what an answer is, and when to stop
asking, is decided here and in `prefopt.signals.chat_attempts`, because many servers speak the protocol only
nearly.

A request that gets no answer drops what asked it, as a refused one does, if the endpoint answers others; if it
answers nobody, the run stops. Which of the two it is, is decided by answers: one that came while the request was
under way, or one to a question that was answered before and is asked again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from prefopt.errors import SignalError
from prefopt.signals.chat_attempts import Asked as _Asked
from prefopt.signals.chat_attempts import Attempts as _Attempts
from prefopt.signals.chat_attempts import (
    ChatRefused,
    Endpoint,
    Unanswered,
    asked_now,
    check_url,
)
from prefopt.signals.chat_attempts import retry_after_s as retry_after_s
from prefopt.signals.chat_replies import Messages, Reply, ReplyCache, reply_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI

for _name in ("httpx2", "openai"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # a line a request, thousands a step

_T = TypeVar("_T")

_MAX_RETRIES = 1_000_000
"""The deadline ends a request, not their number."""
_COUNTS = (
    *("requests", "retries", "cached", "refused", "unanswered"),
    *("prompt_tokens", "completion_tokens"),
)
_FEWEST_HELD = 3
"""Requests without an answer before the endpoint is taken for one that answers nobody."""


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
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._lock = threading.Lock()
        self._known: Messages | None = None
        """A question that was answered."""
        self._answered_at = float("-inf")
        check_url(endpoint.base_url)
        endpoint.authorization()  # a missing key is known before the first step

    def complete_all(self, requests: Sequence[Messages]) -> list[Reply | ChatRefused]:
        """A reply to each request, in order, or why there is none although the endpoint answers others.

        Raises: SignalError if the endpoint answers nobody, or refuses the key.
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
        if replies and self._known is None:
            self._known = next(each for k, each in zip(keys, requests, strict=True) if k in replies)
        if waiting:
            replies |= _run(self._ask_all(waiting))
        return [replies[key] for key in keys]

    def report(self) -> dict[str, float]:
        """Counters since construction; tokens are those the endpoint reported, cached replies' not included."""
        with self._lock:
            return dict(self._counts)

    async def _ask_all(self, waiting: Mapping[str, Messages]) -> dict[str, Reply | ChatRefused]:
        from openai import AsyncOpenAI  # as long to import as all of `prefopt check` takes

        call = _Call(deque(waiting.items()))
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
                    for number in range(min(self.endpoint.concurrency, len(waiting))):
                        workers.create_task(self._work(client, call, from_end=number == 1))
            except ExceptionGroup as failed:  # one failure has cancelled what else was under way
                raise failed.exceptions[0] from None
        for key, failure in call.held.items():
            if self._answered_at < call.began:
                raise failure
            self._refuse(call, key, failure)
        return call.found

    async def _work(self, client: AsyncOpenAI, call: _Call, *, from_end: bool) -> None:
        while call.todo:
            key, messages = call.next(from_end)
            began = time.monotonic()
            try:
                reply = await self._ask(client, messages, self.endpoint.deadline_s)
            except ChatRefused as refused:
                self._count(refused=1)
                call.found[key] = refused
                continue
            except Unanswered as failure:
                await self._unanswered(client, call, key, failure, began)
                continue
            call.found[key] = reply
            self._known, self._answered_at = messages, time.monotonic()
            if self.cache is not None:
                await asyncio.to_thread(self._keep, self.cache, key, reply)

    async def _unanswered(
        self, client: AsyncOpenAI, call: _Call, key: str, failure: Unanswered, began: float
    ) -> None:
        """Refuses the request if the endpoint answers others; holds it while nobody knows.

        Raises: the failure, if the endpoint is not there.
        """
        if self._answered_at < began:
            if not failure.reached:
                raise failure
            if self._known is None:
                call.held[key] = failure
                if len(call.held) >= max(_FEWEST_HELD, self.endpoint.concurrency):
                    raise failure
                return
            async with call.proving:
                if self._answered_at < began:
                    await self._prove(client, failure)
        self._refuse(call, key, failure)

    async def _prove(self, client: AsyncOpenAI, failure: Unanswered) -> None:
        """Asks once more what was answered before. Raises: the failure, if that is not answered either."""
        assert self._known is not None
        limit_s = min(self.endpoint.deadline_s, self.endpoint.timeout_s)
        try:
            await self._ask(client, self._known, limit_s)
        except (ChatRefused, Unanswered):
            raise failure from None
        self._answered_at = time.monotonic()

    def _refuse(self, call: _Call, key: str, failure: Unanswered) -> None:
        self._count(unanswered=1)
        call.found[key] = ChatRefused(f"{failure.reason} (others are answered)")

    async def _ask(self, client: AsyncOpenAI, messages: Messages, limit_s: float) -> Reply:
        """One request until it is answered or refused. Raises: ChatRefused, SignalError, Unanswered."""
        body = {"model": self.endpoint.model, "messages": list(messages), **self.sampling}
        asked = _Asked(end=time.monotonic() + limit_s)
        asked_now.set(asked)
        try:
            async with asyncio.timeout(limit_s):
                # Not `chat.completions.create`: it makes objects of an answer's fields, which servers fill freely.
                await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        except TimeoutError:
            within = f"within deadline_s = {limit_s:g} ({asked.attempts} attempts)"
            raise Unanswered(
                f"{self.endpoint.url} (model {self.endpoint.model!r}) did not answer a request {within}; last: "
                f"{asked.problem}. Start or scale the endpoint, lower concurrency, or raise deadline_s; answers "
                "so far are cached",
                f"no answer {within}; last: {asked.problem}",
                reached=asked.reached,
            ) from None
        assert asked.reply is not None  # `_Attempts` lets no response through without one
        self._count(
            prompt_tokens=asked.reply.prompt_tokens,
            completion_tokens=asked.reply.completion_tokens,
        )
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
class _Call:
    """One `complete_all`, worked on by several tasks."""

    todo: deque[tuple[str, Messages]]
    found: dict[str, Reply | ChatRefused] = field(default_factory=dict)
    held: dict[str, Unanswered] = field(default_factory=dict)
    """Requests without an answer while nobody has had one."""
    began: float = field(default_factory=time.monotonic)
    proving: asyncio.Lock = field(default_factory=asyncio.Lock)

    def next(self, from_end: bool) -> tuple[str, Messages]:
        """What to ask next: mostly in order, but where the first ones get no answer, something far from them.

        A group that is never answered may be more requests than are under way at a time.
        """
        return self.todo.pop() if from_end or self.held else self.todo.popleft()


def _run(asking: Coroutine[Any, Any, _T]) -> _T:
    """The coroutine's result; in a notebook, whose thread has a loop already, by a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asking).result()
