"""A server on this machine that sends any bytes, at any pace, and a table of answers that no protocol asks for."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Reply = bytes | Callable[[socket.socket, threading.Event], None]
"""What is sent: bytes, after which the connection is closed, or whatever a function does with it."""


def http(
    body: Any, status: str = "200 OK", content_type: str = "application/json", **headers: str
) -> bytes:
    """A whole HTTP answer; a body that is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": content_type, "Content-Length": str(len(content))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + content


@contextlib.contextmanager
def odd_server(answer: Callable[[str, bytes], Reply]) -> Iterator[str]:
    """The URL of a server that answers ``(path, body)``; one request a connection."""
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(10)
            reply = answer(*_request(connection))
            if isinstance(reply, bytes):
                connection.sendall(reply)
            else:
                reply(connection, done)

    def accept() -> None:
        listener.settimeout(0.02)
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


def _request(connection: socket.socket) -> tuple[str, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head.split()[1].decode(), body


# --- answers of servers that are ill, or no servers of this kind at all --------------------------------------


def _drip(head: bytes) -> Reply:
    def send(connection: socket.socket, done: threading.Event) -> None:
        connection.sendall(head)
        while not done.wait(0.05):
            connection.sendall(b"x")

    return send


def _silent(connection: socket.socket, done: threading.Event) -> None:
    done.wait(30)


def _reset(connection: socket.socket, done: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _endless(connection: socket.socket, done: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    block = b" " * 2**20
    end = time.monotonic() + 20
    while not done.is_set() and time.monotonic() < end:
        connection.sendall(block)


_OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(b"[" * 2**29, 1)
"""512 MiB of brackets, in 2 MiB."""
TRANSPORT: dict[str, Reply] = {
    "HTML with 200": http(b"<html>Sign in</html>", content_type="text/html"),
    "HTML that says JSON": http(b"<!doctype html>"),
    "nothing": http(b""),
    "white space": http(b" \n "),
    "no charset of this world": http(b"\xff\xfe", content_type="text/html; charset=nothing"),
    "bytes that are no UTF-8": http(b'{"choices": "\xff"}'),
    "NUL bytes": http(b"\0" * 100),
    "half of the JSON": http(b'{"choices": [{"index": 0, '),
    "two JSON texts": http(b'{"choices": []}{"choices": []}'),
    "JSON that is a list": http([]),
    "JSON that is a number": http(7),
    "JSON null": http(None),
    "JSON nested without end": http(b"[" * 100_000),
    "an error with 200": http({"error": {"code": 429, "message": "slow down"}}),
    "a stream of events": http(b"data: {}\n\ndata: [DONE]\n\n", content_type="text/event-stream"),
    "a redirect": http(b"", "302 Found", Location="https://example.com/login"),
    "a redirect to nowhere": http(b"", "308 Permanent Redirect"),
    "a redirect to itself": http(b"", "307 Temporary Redirect", Location="/v1/chat/completions"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "401": http({"error": "who are you"}, "401 Unauthorized"),
    "403 in HTML": http(b"<h1>Forbidden</h1>", "403 Forbidden", "text/html"),
    "404": http({"detail": "Not Found"}, "404 Not Found"),
    "418": http(b"teapot", "418 I'm a teapot", "text/plain"),
    "429 without end": http(b"slow down", "429 Too Many Requests"),
    "429 until next year": http(b"", "429 Too Many Requests", Retry_After="31536000"),
    "500 without end": http(b"Internal Server Error", "500 Internal Server Error", "text/plain"),
    "502 from a gateway": http(b"<html>Bad Gateway</html>", "502 Bad Gateway", "text/html"),
    "503 with a date": http(b"", "503 Gone fishing", Retry_After="Mon, 01 Jan 0001 00:00:00 GMT"),
    "599": http(b"", "599 Network Connect Timeout"),
    "a status that is none": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a header without end": _OK + b"X-A: " + b"a" * 300_000 + b"\r\n\r\n{}",
    "a header that is none": _OK + b"no colon here\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": _OK + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    "a negative length": _OK + b"Content-Length: -2\r\n\r\n{}",
    "less than its length": _OK + b'Content-Length: 999\r\n\r\n{"choices": []}',
    "a chunk that is cut": _OK + b'Transfer-Encoding: chunked\r\n\r\n40\r\n{"choices": ',
    "a chunk whose size is none": _OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "gzip that is none": http(b"not zipped", Content_Encoding="gzip"),
    "an encoding that is none": http(b"?", Content_Encoding="rot13"),
    "a bomb": http(BOMB, Content_Encoding="gzip"),
    "a body without end": _endless,
    "hung up": b"",
    "reset": _reset,
    "silence": _silent,
    "headers drop by drop": _drip(_OK + b"X-A: "),
    "a body drop by drop": _drip(_OK + b"Content-Length: 99999\r\n\r\n"),
}
