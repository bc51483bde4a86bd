"""The key that a server of ours asks for on every route; vLLM's own asks for it on ``/v1`` and a few others alone.

Full fine-tuning opens vLLM's development endpoints, through which whoever reaches the port can run methods of the
engine. A port of this machine is open to every process and user of it, and to pages in a browser.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM reads its key: not an argument, which other users see in the list of processes."""

MIDDLEWARE = f"{__name__}.RequireKey"
"""For vLLM's ``--middleware``, whose last one is the outermost: nothing of the server comes before it."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_REFUSAL = b'{"error": "Unauthorized"}'


class RequireKey:
    """An ASGI application that answers 401 to whatever does not bring the key of this process's environment.

    Raises: KeyError where the environment has none.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self._expected = bearer(os.environ[KEY_VARIABLE]).encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:  # a websocket: closed before it is accepted, which the server answers with 403
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def bearer(key: str) -> str:
    """The value of the header that brings ``key``."""
    return f"Bearer {key}"
