"""The chat client against a real HTTP server: retries, deadlines, cache, keys."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import SignalError
from prefopt.signals.chat_client import (
    ChatClient,
    ChatRefused,
    Endpoint,
    retry_after_s,
)
from prefopt.signals.chat_replies import Reply, ReplyCache
from tests import fork_server
from tests.recipes.commands import HANG_S
from tests.signals.chat_server import Answer, chat_server

KEY = "sk-very-secret-123"
ASK = [{"role": "user", "content": "Hello"}]


def client(base_url: str, cache: Path | None = None, **settings: Any) -> ChatClient:
    endpoint = Endpoint(base_url, "judge-1", **{"deadline_s": 120.0, "timeout_s": 60.0, **settings})
    return ChatClient(endpoint, {"temperature": 0.0}, ReplyCache(cache) if cache else None)


def text_of(reply: Reply | ChatRefused) -> str:
    assert isinstance(reply, Reply), reply
    return reply.text


def test_a_request_holds_model_messages_and_sampling_and_tokens_are_counted() -> None:
    with chat_server(lambda body: Answer("hi")) as server:
        chat = client(server.base_url)
        (reply,) = chat.complete_all([ASK])
    assert text_of(reply) == "hi"
    assert server.requests == [{"model": "judge-1", "messages": ASK, "temperature": 0.0}]
    assert server.authorizations == [None]
    counts = chat.report()
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["requests"]) == (10, 5, 1)


def test_replies_keep_the_order_of_requests_and_concurrency_is_bounded() -> None:
    """Nothing is answered before three requests are under way."""
    three = threading.Barrier(3)

    def answer(body: dict) -> Answer:
        number = int(body["messages"][0]["content"])
        three.wait()
        return Answer(str(number), delay_s=0.01 * (number % 3))

    requests = [[{"role": "user", "content": str(n)}] for n in range(21)]
    with chat_server(answer) as server:
        replies = client(server.base_url, concurrency=3).complete_all(requests)
    assert [text_of(reply) for reply in replies] == [str(n) for n in range(21)]
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    "failure",
    [
        Answer(status=425),
        Answer(status=429),
        Answer(status=500),
        Answer(status=503, headers={"x-should-retry": "false"}),
        Answer(raw=b"<html>busy</html>"),
        Answer(raw=b'{"error": {"code": 429, "message": "rate limited"}}'),
        Answer(raw=b'{"choices": []}'),
        Answer(raw=b"not zipped", headers={"Content-Encoding": "gzip"}),
    ],
    ids=["425", "429", "500", "503", "no JSON", "an error in a 200", "no choice", "no gzip"],
)
def test_a_passing_failure_is_retried(failure: Answer) -> None:
    answers = itertools.chain([failure], itertools.repeat(Answer("ok")))
    with chat_server(lambda body: next(answers)) as server:
        chat = client(server.base_url)
        assert text_of(chat.complete_all([ASK])[0]) == "ok"
    assert chat.report()["retries"] == 1


def _slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, ours and the ``openai`` client's, which then take no time."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    for name in ("anyio.sleep", "asyncio.sleep"):
        monkeypatch.setattr(name, sleep)
    return waits


def test_retry_after_is_waited_for() -> None:
    """On the server's own clock, and longer than any first wait without the header (0.5 s)."""
    answers = iter([Answer(status=429, headers={"Retry-After": "0.7"}), Answer("ok")])
    times: list[float] = []

    def answer(body: dict) -> Answer:
        times.append(time.monotonic())
        return next(answers)

    with chat_server(answer) as server:
        client(server.base_url).complete_all([ASK])
    assert times[1] - times[0] >= 0.7


def test_retry_after_of_minutes_is_waited_for_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = _slept(monkeypatch)
    answers = iter([Answer(status=429, headers={"Retry-After": "300"}), Answer("ok")])
    with chat_server(lambda body: next(answers)) as server:
        assert text_of(client(server.base_url, deadline_s=900.0).complete_all([ASK])[0]) == "ok"
    assert waits[0] == 300 and sum(waits[1:]) <= 0.5


def test_an_endpoint_that_asks_to_wait_beyond_the_deadline_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = _slept(monkeypatch)
    busy = Answer(status=429, headers={"Retry-After": "300"}, raw=b"come back later")
    with chat_server(lambda body: busy) as server:
        with pytest.raises(SignalError, match=r"deadline_s = 120 \(1 attempts\).*429: come back"):
            client(server.base_url).complete_all([ASK])
        assert len(server.requests) == 1 and not waits


def test_retry_after_may_be_seconds_a_date_or_nonsense() -> None:
    assert retry_after_s("7") == 7.0
    assert 9_000 < retry_after_s(formatdate(time.time() + 10_000, usegmt=True)) <= 10_000
    for nonsense in ("soon", None, "-3", "inf", "nan", "6m0s"):
        assert retry_after_s(nonsense) == 0.0


def test_waits_grow_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = _slept(monkeypatch)
    answers = itertools.chain([Answer(status=500)] * 3, itertools.repeat(Answer("ok")))
    with chat_server(lambda body: next(answers)) as server:
        client(server.base_url).complete_all([ASK])
    assert len(waits) == 3
    assert 0.25 <= waits[0] < 0.7 and 0.5 <= waits[1] < 1.2 and 1.0 <= waits[2] < 2.2


def test_an_endpoint_that_is_down_is_named_at_the_deadline() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(SignalError, match=r"127\.0\.0\.1.*judge-1.*deadline_s = 1 .*ConnectError"):
        client(url, deadline_s=1.0).complete_all([ASK])


@contextlib.contextmanager
def _odd_server(*, drip: bool = False, reset: bool = False, good_after: int) -> Iterator[str]:
    """An endpoint whose first connections never end (with ``drip``, a byte comes now and then) or are reset."""
    content = json.dumps({"choices": [{"message": {"content": "ok"}}]}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    done = threading.Event()

    def serve() -> None:
        listener.settimeout(0.05)
        open_: list[socket.socket] = []
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                open_.append(connection)
                if len(open_) > good_after:
                    connection.sendall(answer)
                elif reset:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.close()
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            for connection in open_[:good_after] if drip else []:
                with contextlib.suppress(OSError):
                    connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_an_endpoint_that_does_not_finish_is_named_at_the_deadline(drip: bool) -> None:
    with (
        _odd_server(drip=drip, good_after=1000) as url,
        pytest.raises(SignalError, match=r"did not answer.*ReadTimeout"),
    ):
        client(url, timeout_s=0.5, deadline_s=1.5).complete_all([ASK])


@pytest.mark.parametrize(
    "oddity",
    [{"drip": False}, {"drip": True}, {"reset": True}],
    ids=["silent", "dripping", "reset"],
)
def test_an_attempt_that_does_not_finish_is_not_the_last(oddity: dict[str, bool]) -> None:
    """Dripping: a byte now and then keeps a per-read time-out from ever firing."""
    with _odd_server(**oddity, good_after=1) as url:
        chat = client(url, timeout_s=0.5)
        assert text_of(chat.complete_all([ASK])[0]) == "ok"
    assert chat.report()["retries"] >= 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_model_or_url_stops_at_once_and_never_shows_the_key(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": f"Incorrect API key provided: {KEY}"}).encode()
    with chat_server(lambda _: Answer(status=status, raw=body)) as server:
        chat = client(server.base_url, api_key_env="MY_JUDGE_KEY")
        with pytest.raises(SignalError, match=rf"HTTP {status}.*Incorrect.*\*\*\*") as caught:
            chat.complete_all([ASK])
    assert server.authorizations == [f"Bearer {KEY}"]
    shown = f"{caught.value} {caught.value.__cause__} {vars(chat)} {chat.endpoint} {caplog.text}"
    assert KEY not in shown and "MY_JUDGE_KEY" in shown


def test_a_failure_does_not_wait_for_what_else_is_under_way() -> None:
    failed = threading.Event()

    def answer(body: dict) -> Answer:
        if body["messages"] == ASK:
            failed.wait()
        return Answer(status=401)

    other = [{"role": "user", "content": "x"}]
    with chat_server(answer) as server:
        try:
            with pytest.raises(SignalError, match="HTTP 401"):
                client(server.base_url, concurrency=2).complete_all([ASK, other])
        finally:
            failed.set()


def test_nothing_goes_anywhere_but_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the environment holds for OpenAI's own, and no redirect is followed."""
    secrets = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_ADMIN_KEY": KEY,
        "OPENAI_ORG_ID": "org-1",
        "OPENAI_PROJECT_ID": "project-1",
        "OPENAI_CUSTOM_HEADERS": f"X-Gateway: {KEY}",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with chat_server(lambda body: Answer("elsewhere")) as other:
        away = {"Location": f"{other.base_url}/chat/completions"}
        with chat_server(lambda body: Answer(status=307, headers=away)) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
            with pytest.raises(SignalError, match="HTTP 307"):
                client(server.base_url).complete_all([ASK])
    assert not other.requests
    (sent,) = server.headers
    assert not {value for value in secrets.values() if value in str(sent)}
    assert not {name for name in sent if name.lower().startswith(("openai", "x-", "authorization"))}


def test_a_notebook_may_ask_though_its_thread_has_a_loop_already() -> None:
    async def cell() -> list[Reply | ChatRefused]:
        return client(server.base_url).complete_all([ASK])

    with chat_server(lambda body: Answer("hi")) as server:
        assert text_of(asyncio.run(cell())[0]) == "hi"


def test_a_request_that_is_refused_does_not_take_the_others_along() -> None:
    def answer(body: dict) -> Answer:
        long = len(body["messages"][0]["content"]) > 10
        return Answer(status=400, raw=b"context length exceeded") if long else Answer("ok")

    requests = [ASK, [{"role": "user", "content": "x" * 100}], ASK]
    with chat_server(answer) as server:
        chat = client(server.base_url)
        first, second, third = chat.complete_all(requests)
    assert text_of(first) == text_of(third) == "ok"
    assert isinstance(second, ChatRefused) and "context length" in str(second)
    assert chat.report()["refused"] == 1


def test_an_answer_with_half_a_surrogate_pair_is_no_text_and_asked_for_once() -> None:
    raw = b'{"choices": [{"message": {"content": "[[A]] \\ud83d"}, "finish_reason": "stop"}]}'
    with chat_server(lambda body: Answer(raw=raw)) as server:
        chat = client(server.base_url)
        (found,) = chat.complete_all([ASK])
    assert isinstance(found, ChatRefused) and "half of a surrogate pair" in str(found)
    assert (chat.report()["requests"], chat.report()["refused"]) == (1, 1)


def test_an_answer_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "[["}, {"type": "reasoning"}, {"type": "text", "text": "B]]"}]
    raw = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    with chat_server(lambda body: Answer(raw=raw)) as server:
        (found,) = client(server.base_url).complete_all([ASK])
    assert text_of(found) == "[[B]]"


def test_replies_are_cached_by_model_messages_and_sampling_and_never_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    with chat_server(lambda body: Answer(f"{body['temperature']}")) as server:
        cache = ReplyCache(tmp_path)
        warm = Endpoint(server.base_url, "judge-1", api_key_env="MY_JUDGE_KEY")
        other = Endpoint(server.base_url, "judge-2")
        for endpoint, temperature, expected in (
            (warm, 0.0, 1), (warm, 0.0, 1), (warm, 0.5, 2), (other, 0.0, 3), (warm, 0.5, 3),
        ):  # fmt: skip
            chat = ChatClient(endpoint, {"temperature": temperature}, cache)
            assert text_of(chat.complete_all([ASK])[0]) == str(temperature)
            assert len(server.requests) == expected
    assert chat.report() == {**chat.report(), "cached": 1, "requests": 0, "prompt_tokens": 0}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all(KEY not in path.read_text() and KEY not in path.name for path in files)


def test_log_probs_of_the_first_token_come_back_also_from_the_cache(tmp_path: Path) -> None:
    with chat_server(lambda body: Answer("m", top_logprobs={"m": -0.1, "M": -2.5})) as server:
        first, again = (client(server.base_url, tmp_path).complete_all([ASK])[0] for _ in "ab")
    assert isinstance(first, Reply) and isinstance(again, Reply) and again.cached
    assert first.top_logprobs == again.top_logprobs == {"m": -0.1, "M": -2.5}


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, {"content": []}, {"content": [{"token": "m"}]}, {"tokens": ["m"]}, ["m"]],
    ids=["null", "empty", "no token", "no alternatives", "completions protocol", "a list"],
)
def test_an_answer_without_log_probs_in_the_chat_protocol_has_none(logprobs: Any) -> None:
    choice = {"message": {"content": "m"}, "finish_reason": "stop", "logprobs": logprobs}
    raw = json.dumps({"choices": [choice]}).encode()
    with chat_server(lambda body: Answer(raw=raw)) as server:
        assert client(server.base_url).complete_all([ASK]) == [Reply("m", "stop", 0, 0)]


def test_replies_that_were_cached_without_log_probs_are_still_read(tmp_path: Path) -> None:
    old = {"text": "m", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1}
    path = tmp_path / "ab" / "abc.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**old, "cached": False}))
    assert ReplyCache(tmp_path).get("abc") == Reply("m", "stop", 3, 1, cached=True)


def test_an_empty_reply_is_not_kept(tmp_path: Path) -> None:
    """A gateway's failure may read so: `content` null, `finish_reason` "error"."""
    failed = {"choices": [{"message": {"content": None}, "finish_reason": "error"}]}
    answers = iter([Answer(raw=json.dumps(failed).encode()), Answer("good")])
    with chat_server(lambda body: next(answers)) as server:
        assert text_of(client(server.base_url, tmp_path).complete_all([ASK])[0]) == ""
        assert text_of(client(server.base_url, tmp_path).complete_all([ASK])[0]) == "good"
        assert text_of(client(server.base_url, tmp_path).complete_all([ASK])[0]) == "good"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"text": "x"}', b"[1]"])
def test_a_damaged_cache_file_is_asked_for_again(tmp_path: Path, damage: bytes) -> None:
    with chat_server(lambda body: Answer("good")) as server:
        client(server.base_url, tmp_path).complete_all([ASK])
        (file,) = (path for path in tmp_path.rglob("*.json"))
        file.write_bytes(damage)
        assert text_of(client(server.base_url, tmp_path).complete_all([ASK])[0]) == "good"
        assert json.loads(file.read_text())["text"] == "good"
    assert len(server.requests) == 2


def _write_forever(directory: str) -> None:
    cache = ReplyCache(Path(directory))
    for number in itertools.count():
        cache.put("ab" + "0" * 62, Reply(str(number) * 5000, "stop", 1, 1))


def test_a_writer_that_is_killed_leaves_whole_replies_only(tmp_path: Path) -> None:
    for _ in range(3):
        writer = fork_server.fork(_write_forever, str(tmp_path), daemon=True)
        writer.start()
        end = time.monotonic() + HANG_S
        while ReplyCache(tmp_path).get("ab" + "0" * 62) is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.05)
        writer.kill()
        writer.join()
        reply = ReplyCache(tmp_path).get("ab" + "0" * 62)
        assert reply is not None and len(set(reply.text)) <= len(reply.text) / 5000
        next(tmp_path.rglob("ab*.json")).unlink()


def test_a_key_that_is_not_set_is_known_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MY_JUDGE_KEY", raising=False)
    with pytest.raises(SignalError, match=r"'MY_JUDGE_KEY'.*not set"):
        client("http://localhost:1/v1", api_key_env="MY_JUDGE_KEY")


@pytest.mark.parametrize(
    "url", ["http://user:pw@host/v1", "http://host/v1?key=sk-1", "host/v1", ""]
)
def test_urls_that_hold_keys_or_are_none_are_refused_unquoted(url: str) -> None:
    with pytest.raises(SignalError, match="base_url") as caught:
        client(url)
    assert "pw" not in str(caught.value) and "sk-1" not in str(caught.value)
