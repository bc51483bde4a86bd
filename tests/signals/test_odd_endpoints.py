"""Judges' endpoints that send anything: a right value, a counted miss, or one clear sentence, in time."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prefopt.errors import SignalError
from prefopt.signals import chat_attempts
from prefopt.signals.chat_client import ChatClient, ChatRefused, Endpoint
from prefopt.signals.chat_replies import Reply
from tests.signals.odd_server import TRANSPORT, http, odd_server
from tests.signals.odd_server import Reply as Sent

DEADLINE_S, SLACK_S = 1.2, 8.0
GOOD = {"index": 0, "message": {"role": "assistant", "content": "[[A]]"}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def chat(choices: Any = None, **more: Any) -> bytes:
    return http({"choices": [GOOD] if choices is None else choices, "usage": USAGE, **more})


def message(content: Any, **more: Any) -> bytes:
    return chat([{**GOOD, "message": {"role": "assistant", "content": content}, **more}])


def logprobs(value: Any) -> bytes:
    top = [{"token": "m", "logprob": value}, {"token": "M", "logprob": -3.0}]
    return message("m", logprobs={"content": [{**top[0], "top_logprobs": top}]})


MISSES: dict[str, bytes] = {
    "choices null": http({"choices": None, "usage": USAGE}),
    "choices empty": chat([]),
    "choices an object": chat({"0": GOOD}),
    "choices of texts": chat(["[[A]]"]),
    "choices of null": chat([None]),
    "message null": chat([{"index": 0, "message": None, "finish_reason": "content_filter"}]),
    "message a text": chat([{"index": 0, "message": "[[A]]"}]),
    "message a list": chat([{"index": 0, "message": [{"content": "[[A]]"}]}]),
    "no message": chat([{"index": 0, "text": "[[A]]"}]),
    "content a number": message(7),
    "content an object": message({"text": "[[A]]"}),
    "content of texts": message(["[[A]]"]),
    "half of a surrogate pair": http(
        json.dumps({"choices": [GOOD]}).replace("[[A]]", "\\ud83d").encode()
    ),
}
"""Answers without text, or with text that is none."""
VALUES: dict[str, bytes] = {
    "usage null": chat(usage=None),
    "usage a list": chat(usage=[10, 5]),
    "usage in texts": chat(usage={"prompt_tokens": "10", "completion_tokens": "n/a"}),
    "usage below 0": chat(usage={"prompt_tokens": -10, "completion_tokens": 1e400}),
    "usage NaN": chat(usage={"prompt_tokens": float("nan"), "completion_tokens": 1e300}),
    "another index first": chat([{**GOOD, "index": 1, "message": {"content": "[[B]]"}}, GOOD]),
    "the same choice twice": chat([GOOD, GOOD]),
    "no index": chat([{"message": {"content": "[[A]]"}}]),
    "a finish reason of its own": chat([{**GOOD, "finish_reason": {"type": "done"}}]),
    "content in parts": message(
        [{"type": "thinking", "thinking": "[[B]]"}, {"type": "text", "text": "[[A]]"}]
    ),
    "reasoning beside it": chat(
        [{**GOOD, "message": {"content": "[[A]]", "reasoning_content": "[[B]]"}}]
    ),
}
"""Answers that say what was asked, with nonsense beside it."""


@pytest.fixture(autouse=True)
def small_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_attempts, "_MOST_BYTES", 4 * 2**20)


def asked(url: str, name: str, contents: list[str]) -> list[Any]:
    """The outcome of each request to a server of kind ``name``, and the client's report."""
    endpoint = Endpoint(f"{url}/v1", name, deadline_s=DEADLINE_S, timeout_s=0.6)
    client = ChatClient(endpoint, {}, None)
    started = time.monotonic()
    found: list[Any]
    try:
        found = list(client.complete_all([[{"role": "user", "content": c}] for c in contents]))
    except SignalError as error:
        found = [error] * len(contents)
    assert time.monotonic() - started < DEADLINE_S + SLACK_S, name
    return [*found, client.report()]


def outcomes(table: dict[str, Sent], contents: list[str]) -> dict[str, list[Any]]:
    """What comes of ``contents`` at a server of each kind, which answers all others but POISON well."""

    def answer(path: str, body: bytes) -> Sent:
        request = json.loads(body)
        poison = "POISON" in request["messages"][0]["content"]
        return table[request["model"]] if poison else chat()

    with odd_server(answer) as url, ThreadPoolExecutor(12) as pool:
        found = pool.map(lambda name: asked(url, name, contents), table)
        return dict(zip(table, found, strict=True))


def is_a_sentence(error: Exception) -> bool:
    text = str(error)
    return 10 < len(text) < 900 and "Traceback" not in text and text.count("\n") < 3


def test_a_request_that_gets_no_answer_is_a_counted_miss_where_others_get_one() -> None:
    keys = {"401"}  # said of the key, and so of every request
    table: dict[str, Sent] = {**TRANSPORT, **MISSES}
    for name, (good, poison, report) in outcomes(table, ["fine", "POISON"]).items():
        if name in keys:
            assert isinstance(poison, SignalError) and is_a_sentence(poison), name
            continue
        assert good == Reply("[[A]]", "stop", 10, 5), name
        assert isinstance(poison, ChatRefused) and str(poison), (name, poison)
        assert report["unanswered"] + report["refused"] == 1, name


def test_an_endpoint_that_answers_nobody_is_one_clear_sentence() -> None:
    refused = {"418", "half of a surrogate pair"}  # said of this one request alone
    table: dict[str, Sent] = {**TRANSPORT, **MISSES}
    for name, (found, _) in outcomes(table, ["POISON"]).items():
        assert isinstance(found, ChatRefused if name in refused else SignalError), (name, found)
        assert is_a_sentence(found), (name, found)
        assert name in refused or "/v1/chat/completions" in str(found), (name, found)


def test_what_is_odd_beside_the_answer_does_not_change_it() -> None:
    for name, (found, _) in outcomes(dict(VALUES), ["POISON"]).items():
        assert isinstance(found, Reply) and found.text == "[[A]]", (name, found)
        assert 0 <= found.prompt_tokens <= 10 and 0 <= found.completion_tokens <= 5, (name, found)


@pytest.mark.parametrize(
    ("value", "kept"),
    [(-0.1, True), (0, True), (1e-5, True), (float("-inf"), True), (0.7, False), (float("nan"), False),
     ("-0.1", False), (True, False), (None, False), ([-0.1], False)],
)  # fmt: skip
def test_log_probs_of_which_one_is_none_are_none(value: Any, kept: bool) -> None:
    [found, _] = outcomes({"x": logprobs(value)}, ["POISON"])["x"]
    assert isinstance(found, Reply) and bool(found.top_logprobs) == kept


def test_a_group_of_requests_without_an_answer_does_not_hide_an_endpoint_that_is_there() -> None:
    """More of them than are under way at a time, and they come first."""
    requests = [*[f"POISON {n}" for n in range(12)], "fine", "fine too"]
    *found, report = outcomes({"x": MISSES["choices empty"]}, requests)["x"]
    assert [isinstance(each, ChatRefused) for each in found] == [True] * 12 + [False] * 2
    assert report["unanswered"] == 12


def test_an_endpoint_that_goes_away_later_stops_and_one_bad_request_then_does_not() -> None:
    """What was answered before is asked once more, to know which of the two it is."""
    gone = False

    def answer(path: str, body: bytes) -> Sent:
        return TRANSPORT["404"] if gone or b"POISON" in body else chat()

    with odd_server(answer) as url:
        endpoint = Endpoint(f"{url}/v1", "m", deadline_s=30.0)
        client = ChatClient(endpoint, {}, None)
        ask = lambda text: client.complete_all([[{"role": "user", "content": text}]])  # noqa: E731
        assert isinstance(ask("fine")[0], Reply)
        assert isinstance(ask("POISON")[0], ChatRefused)
        gone = True
        with pytest.raises(SignalError, match="HTTP 404"):
            ask("POISON again")
