"""vLLM servers that send anything: what was asked for, or one clear sentence that names the server, in time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prefopt.engines.base import Completion, Request, SamplingSpec
from prefopt.engines.vllm import client as client_module
from prefopt.engines.vllm.client import ConnectionLost, ModelCard, ServerClient
from prefopt.engines.vllm.hosts import FoundHost
from prefopt.engines.vllm.server import VllmServers
from prefopt.errors import EngineError
from tests.signals.odd_server import TRANSPORT, http, odd_server
from tests.signals.odd_server import Reply as Sent

DEADLINE_S, SLACK_S = 1.2, 8.0
SPEC = SamplingSpec(max_new_tokens=3, stop_token_ids=(7,))
PROMPT = (1, 2)
LOGPROBS = {"token_logprobs": [-0.5, -1.0], "tokens": ["token_id:3", "token_id:7"]}
CHOICE: dict[str, Any] = {
    "index": 0, "token_ids": [3, 7], "prompt_token_ids": [1, 2], "finish_reason": "stop", "text": "",
    "logprobs": LOGPROBS,
}  # fmt: skip
ROWS = [
    None,
    {"2": {"logprob": -1.0}},
    {"3": {"logprob": -2.0, "rank": 1}},
    {"7": {"logprob": -0.5}},
]


def completion(**change: Any) -> bytes:
    return http({"model": "m", "choices": [{**CHOICE, **change}]})


def named(values: list[Any]) -> dict[str, Any]:
    return {**LOGPROBS, "token_logprobs": values}


def scores(rows: Any) -> bytes:
    return http({"choices": [{"index": 0, "prompt_logprobs": rows}]})


def models(*cards: Any) -> bytes:
    return http({"object": "list", "data": list(cards)})


COMPLETIONS: dict[str, bytes] = {
    "choices null": http({"choices": None}),
    "no choice": http({"choices": []}),
    "two choices": http({"choices": [CHOICE, {**CHOICE, "index": 1}]}),
    "the same choice twice": http({"choices": [CHOICE, CHOICE]}),
    "an object of choices": http({"choices": {"0": CHOICE}}),
    "a choice that is a text": http({"choices": ["ok"]}),
    "index 1": completion(index=1),
    "another model": http({"model": "gpt", "choices": [CHOICE]}),
    "another prompt": completion(prompt_token_ids=[2, 1]),
    "a cut prompt": completion(prompt_token_ids=[2]),
    "no token ids": completion(token_ids=None),
    "ids in a text": completion(token_ids="37"),
    "ids that are floats": completion(token_ids=[3.0, 7.0]),
    "ids that are booleans": completion(token_ids=[True, True]),
    "ids below 0": completion(token_ids=[-3, 7]),
    "ids outside the vocabulary": completion(token_ids=[300, 7], logprobs=named([-1, -1]) | {"tokens": None}),
    "more ids than log-probs": completion(token_ids=[3, 3, 7]),
    "other ids than the log-probs name": completion(token_ids=[4, 7]),
    "no tokens at all": completion(token_ids=[], logprobs={"token_logprobs": [], "tokens": []}),
    "more tokens than asked for": completion(token_ids=[3] * 4, logprobs={"token_logprobs": [-1] * 4}),
    "no log-probs": completion(logprobs=None),
    "log-probs of another protocol": completion(logprobs={"content": []}),
    "log-probs in a list": completion(logprobs=[-0.5, -1.0]),
    "a log-prob NaN": completion(logprobs=named([float("nan"), -1])),
    "a log-prob above 0": completion(logprobs=named([0.5, -1])),
    "a log-prob -inf": completion(logprobs=named([float("-inf"), -1])),
    "a log-prob null": completion(logprobs=named([None, -1])),
    "a log-prob in a text": completion(logprobs=named(["-0.5", -1])),
    "no finish reason": completion(finish_reason=None),
    "a finish reason of its own": completion(finish_reason="abort"),
    "a finish reason that is an object": completion(finish_reason={"type": "stop"}),
    "stopped at no stop token": completion(
        token_ids=[7, 3], logprobs={"token_logprobs": [-1, -1]}, finish_reason="stop"
    ),
    "a stop token in the midst": completion(
        token_ids=[7, 3, 3], logprobs={"token_logprobs": [-1] * 3}, finish_reason="length"
    ),
    "cut before its length": completion(
        token_ids=[3, 3], logprobs={"token_logprobs": [-1, -1]}, finish_reason="length"
    ),
}  # fmt: skip
SCORES: dict[str, bytes] = {
    "no prompt_logprobs": scores(None),
    "fewer rows than tokens": scores(ROWS[:3]),
    "more rows than tokens": scores([None, *ROWS]),
    "a row without the token": scores([*ROWS[:3], {"8": {"logprob": -0.5}}]),
    "a row that is null": scores([*ROWS[:3], None]),
    "a row that is a number": scores([*ROWS[:3], {"7": -0.5}]),
    "a score NaN": scores([*ROWS[:3], {"7": {"logprob": float("nan")}}]),
    "a score above 0": scores([*ROWS[:3], {"7": {"logprob": 1}}]),
}
MODELS: dict[str, bytes] = {
    "no list": http({"data": None}),
    "an empty list": models(),
    "models that are texts": models("m"),
    "adapters alone": models({"id": "a", "parent": "m"}),
    "an id that is a number": models({"id": 7}),
    "no id": models({"root": "/m"}),
    "a length below 0": models({"id": "m", "max_model_len": -1}),
    "a length in a text": models({"id": "m", "max_model_len": "4096"}),
    "a length true": models({"id": "m", "max_model_len": True}),
}


@pytest.fixture(autouse=True)
def small_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_MOST_BYTES", 4 * 2**20)


def complete(client: ServerClient, deadline: float) -> Any:
    return client.complete("m", PROMPT, SPEC, 0, deadline, 32)


def score(client: ServerClient, deadline: float) -> Any:
    return client.score("m", PROMPT, (3, 7), deadline)


def model(client: ServerClient, deadline: float) -> Any:
    return client.model(deadline)


def outcomes(
    table: dict[str, Sent], call: Callable[[ServerClient, float], Any]
) -> dict[str, tuple[Any, str]]:
    """What ``call`` gives, or how it fails, at a server of each kind; and that server's URL."""

    def one(item: tuple[str, Sent]) -> tuple[Any, str]:
        name, sent = item
        with odd_server(lambda path, body: sent) as url:
            client = ServerClient(url, through_proxy=False)
            started = time.monotonic()
            try:
                found = call(client, started + DEADLINE_S)
            except (EngineError, ConnectionLost) as error:
                found = error
            finally:
                client.close()
            assert time.monotonic() - started < DEADLINE_S + SLACK_S, name
        return found, url

    with ThreadPoolExecutor(12) as pool:
        return dict(zip(table, pool.map(one, table.items()), strict=True))


def assert_all_refused(found: dict[str, tuple[Any, str]]) -> None:
    for name, (error, url) in found.items():
        text = str(error)
        assert isinstance(error, EngineError | ConnectionLost), (name, error)
        assert 5 < len(text) < 1000 and "Traceback" not in text, (name, text)
        # a lost connection is tried again, and then named by whoever gave up
        assert isinstance(error, ConnectionLost) or url in text, (name, text)


def test_the_answers_that_the_odd_ones_are_made_of_are_right() -> None:
    found = outcomes({"x": completion()}, complete)["x"][0]
    assert found == Completion((3, 7), (-0.5, -1.0), "eos")
    assert outcomes({"x": scores(ROWS)}, score)["x"][0] == [-2.0, -0.5]
    card = {"id": "m", "root": "/m", "max_model_len": 64}
    assert outcomes({"x": models(card)}, model)["x"][0] == ModelCard("m", "/m", 64)


def test_what_is_no_answer_at_all_is_one_sentence_in_time() -> None:
    assert_all_refused(outcomes(dict(TRANSPORT), complete))


@pytest.mark.parametrize(
    ("table", "call"), [(COMPLETIONS, complete), (SCORES, score), (MODELS, model)]
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    table: dict[str, bytes], call: Callable[[ServerClient, float], Any]
) -> None:
    assert_all_refused(outcomes(dict(table), call))


@pytest.mark.parametrize("name", ["usage", "a finish reason twice", "a rounded certainty"])
def test_what_is_odd_beside_the_answer_does_not_change_it(name: str) -> None:
    sent = {
        "usage": http({"choices": [CHOICE], "usage": {"prompt_tokens": float("nan")}}),
        "a finish reason twice": http(
            json.dumps({"choices": [CHOICE]}).replace('"index"', '"text": "", "index"').encode()
        ),
        "a rounded certainty": completion(logprobs=named([1e-6, -1.0])),
    }[name]
    found = outcomes({"x": sent}, complete)["x"][0]
    assert isinstance(found, Completion) and found.ids == (3, 7)
    assert math.isclose(found.logps[1], -1.0)


def test_a_found_server_that_is_ill_ends_a_run_with_a_sentence_that_names_it() -> None:
    """From its health on: what stands at engine.urls may be anything."""
    card = models({"id": "m", "root": "m", "max_model_len": 64})

    def at(ill: Sent) -> Callable[[str, bytes], Sent]:
        healthy = {"/health": http(b""), "/v1/models": card}
        return lambda path, body: healthy.get(path, ill)

    ill = ["nothing", "HTML with 200", "hung up", "503 with a date", "a redirect", "silence"]
    for sent in [*(TRANSPORT[name] for name in ill), COMPLETIONS["no tokens at all"]]:
        with odd_server(at(sent)) as url:
            engine = VllmServers([FoundHost(url, startup_timeout_s=2.0)], model="m", timeout_s=1.0)
            with pytest.raises(EngineError, match=url):
                engine.generate([Request(PROMPT, (0,))], SPEC)
            engine.close()
