"""A chat endpoint on this machine: real HTTP, answers by a function of the request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the endpoint sends back."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Sent instead of a chat completion."""
    delay_s: float = 0.0
    finish_reason: str = "stop"
    top_logprobs: dict[str, float] | None = None
    """Of the first token, as an endpoint sends them that was asked for log-probs."""


@dataclass
class ChatServer:
    """A running endpoint and what it was asked."""

    base_url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def authorizations(self) -> list[str | None]:
        return [each.get("Authorization") for each in self.headers]


def _logprobs(answer: Answer) -> dict[str, Any]:
    """The protocol's shape: a list of tokens, each with its likeliest alternatives."""
    if answer.top_logprobs is None:
        return {}
    top = [{"token": token, "logprob": value} for token, value in answer.top_logprobs.items()]
    return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


@contextlib.contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[ChatServer]:
    """Serves ``/v1/chat/completions`` until the block ends; 10 prompt and 5 completion tokens an answer."""
    state = ChatServer()
    lock = threading.Lock()
    active = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                active[0] += 1
                state.most_at_once = max(state.most_at_once, active[0])
            try:
                self._send(answer(body))
            finally:
                with lock:
                    active[0] -= 1

        def _send(self, found: Answer) -> None:
            time.sleep(found.delay_s)
            message = {"message": {"role": "assistant", "content": found.text}}
            choice = {**message, "finish_reason": found.finish_reason, **_logprobs(found)}
            data = {
                "choices": [choice],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
            content = found.raw if found.raw is not None else json.dumps(data).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
