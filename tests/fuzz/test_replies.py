"""What servers answer: a judge's endpoint and a vLLM server may send any bytes."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import strategies as st

from prefopt.engines.base import Completion, SamplingSpec
from prefopt.engines.vllm.client import ConnectionLost, ModelCard, ServerClient
from prefopt.errors import EngineError, SignalError
from prefopt.signals.chat_client import ChatRefused, Endpoint, _Asked, _Attempts, retry_after_s
from prefopt.signals.chat_replies import Reply, ReplyCache, parse_reply
from tests.fuzz.mutations import as_json, fuzzed, mutated_bytes, mutated_value, steps

CHATS: list[Any] = [
    {"id": "1", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant",
     "content": "[[A]] é"}}],
     "usage": {"prompt_tokens": 10, "completion_tokens": 5}},
    {"choices": [{"message": {"content": [{"type": "text", "text": "yes"}]}, "finish_reason": "length",
     "logprobs": {"content": [{"token": "y", "logprob": -0.1, "top_logprobs": [
     {"token": "y", "logprob": -0.1}]}]}}]},
    {"error": {"message": "no", "code": 429}},
]  # fmt: skip
COMPLETION: dict[str, Any] = {"choices": [{"index": 0, "token_ids": [3, 4], "finish_reason": "stop", "text": "",
    "logprobs": {    "token_logprobs": [-0.5, -1.0], "tokens": ["token_id:3", "token_id:4"]}}]}  # fmt: skip
SCORES = {
    "choices": [
        {"prompt_logprobs": [None, {"1": {"logprob": -1.0}}, {"3": {"logprob": -2, "rank": 1}}]}
    ]
}
MODELS = {
    "data": [
        {"id": "m", "root": "/m", "max_model_len": 64, "parent": None},
        {"id": "a", "parent": "m"},
    ]
}
SERVED: list[Any] = [COMPLETION, SCORES, MODELS]
STATUSES = st.sampled_from([200, 200, 200, 200, 204, 302, 400, 404, 408, 422, 429, 500, 503])
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "content-type", "content-encoding", "location"]),
    st.sampled_from(["", "1", "-1", "nan", "inf", "1e400", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT",
                     "Mon, 01 Jan 0001 00:00:00 GMT", "x", "text/html; charset=nothing", "gzip",
                     "application/json"]),
    max_size=2,
)  # fmt: skip
ENDPOINT = Endpoint("http://127.0.0.1:9/v1", "m", timeout_s=1.0, deadline_s=1.0)


def check_chat(folder: Path, content: bytes) -> None:
    with steps():
        reply = parse_reply(content)
    if reply is None:
        return
    assert isinstance(reply.text, str) and isinstance(reply.finish_reason, str | None)
    assert reply.prompt_tokens >= 0 and reply.completion_tokens >= 0
    assert all(value == value for value in reply.top_logprobs.values())
    cache = ReplyCache(folder / "cache")
    key = hashlib.sha256(content).hexdigest()  # what is not kept must not be found as another's
    cache.put(key, reply)
    kept = cache.get(key)
    if reply.text.strip():
        assert kept is not None and kept.text == reply.text
    else:  # white space is no answer either
        assert kept is None


def check_cached(folder: Path, content: bytes) -> None:
    path = folder / "cache" / "cd" / "cd.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with steps():
        reply = ReplyCache(folder / "cache").get("cd")
    assert reply is None or (isinstance(reply.text, str) and reply.text)


def check_judged(folder: Path, case: tuple[int, dict[str, str], bytes]) -> None:
    """One attempt of the chat client: an answer, another try, or an end with a sentence."""
    del folder
    status, headers, content = case
    asked = _Asked(end=time.monotonic() - 1)  # no time left to wait in

    async def judge() -> None:
        try:
            response = httpx2.Response(status, headers=headers, content=content)
        except (httpx2.RequestError, ValueError):
            return  # where the transport reads it: `_Attempts.send` has it
        await _Attempts._judge(_attempts(), response, asked)

    try:
        with steps():
            asyncio.run(judge())
    except (ChatRefused, SignalError, httpx2.DecodingError, TimeoutError) as error:
        str(error).encode("utf-8", "backslashreplace")
    if asked.reply is not None and status == 200:
        assert isinstance(asked.reply.text, str)
    assert retry_after_s(headers.get("retry-after")) >= 0


def _attempts() -> Any:
    found = _Attempts.__new__(_Attempts)  # not its constructor, which reads certificates
    found._endpoint = ENDPOINT
    return found


def answering(status: int, headers: dict[str, str], content: bytes) -> ServerClient:
    """A client whose server answers this to everything: 20,000 inputs, and no socket."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(content))

    client = _client()
    client._http._transport = httpx2.MockTransport(answer)
    return client


def test_the_answers_that_are_mutated_are_right() -> None:
    replies = [parse_reply(as_json(chat)) for chat in CHATS]
    assert [reply and reply.text for reply in replies] == ["[[A]] é", "yes", None]
    assert replies[1] is not None and replies[1].top_logprobs == {"y": -0.1}
    deadline, spec = time.monotonic() + 3600, SamplingSpec(max_new_tokens=4)
    model = answering(200, {}, as_json(MODELS)).model(deadline)
    assert model == ModelCard("m", "/m", 64)
    completion = answering(200, {}, as_json(COMPLETION)).complete("m", [1], spec, 0, deadline)
    assert completion == Completion((3, 4), (-0.5, -1.0), "eos")
    assert answering(200, {}, as_json(SCORES)).score("m", [1, 1], [3], deadline) == [-2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [3]}, {"token_ids": [3, -1]}, {"token_ids": "34"}, {"finish_reason": "abort"},
        {"logprobs": {"token_logprobs": [-0.5, None]}}, {"logprobs": {"token_logprobs": [-0.5, float("nan")]}},
    ],
)  # fmt: skip
def test_a_completion_that_is_none_is_an_error_that_names_the_server(
    change: dict[str, Any],
) -> None:
    body = as_json({"choices": [{**COMPLETION["choices"][0], **change}]})
    deadline, spec = time.monotonic() + 3600, SamplingSpec(max_new_tokens=4)
    with pytest.raises(
        EngineError, match=r"http://127\.0\.0\.1:9/v1/completions answers otherwise"
    ):
        answering(200, {}, body).complete("m", [1], spec, 0, deadline)


def check_served(folder: Path, case: tuple[int, dict[str, str], bytes]) -> None:
    del folder
    client = answering(*case)
    deadline = time.monotonic() + 3600
    calls = (
        lambda: client.model(deadline),
        lambda: client.complete("m", [1, 2], SamplingSpec(max_new_tokens=4), 0, deadline),
        lambda: client.score("m", [1], [1, 3], deadline),
        lambda: client.post_object("/reset_prefix_cache", None, deadline),
        client.is_healthy,
    )
    for call in calls:
        try:
            with steps():
                found: Any = call()
        except (EngineError, ConnectionLost):
            continue
        assert isinstance(json.dumps(getattr(found, "logprobs", None), allow_nan=False), str)


@functools.cache  # certificates take long to load
def _client() -> ServerClient:
    return ServerClient("http://127.0.0.1:9", through_proxy=False)


def cases(values: list[Any]) -> st.SearchStrategy[tuple[int, dict[str, str], bytes]]:
    return st.tuples(STATUSES, HEADERS, bodies(values))


def bodies(values: list[Any]) -> st.SearchStrategy[bytes]:
    return st.one_of(
        mutated_value(values).map(as_json),
        mutated_bytes([*map(as_json, values), b"<html>no</html>"]),
    )


KEPT: list[Any] = [vars(Reply("yes", "stop", 3, 4, top_logprobs={"y": -0.1}))]
test_chats, test_many_chats = fuzzed(bodies(CHATS), check_chat, share=0.3)
test_cached, test_many_cached = fuzzed(bodies(KEPT), check_cached, share=0.1)
test_judged, test_many_judged = fuzzed(cases(CHATS), check_judged, share=0.3)
test_served, test_many_served = fuzzed(cases(SERVED), check_served, share=0.3)
