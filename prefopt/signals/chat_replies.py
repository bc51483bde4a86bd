"""Replies of chat endpoints: what is read in them, and where they are kept."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.storage.cache import atomic_write
from prefopt.storage.json_text import parse_json

Messages = Sequence[Mapping[str, Any]]
_KEY_VERSION = 1
_MOST_TOKENS = 2**53


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    finish_reason: str | None
    """``length``: the answer was cut by max_tokens."""
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    top_logprobs: Mapping[str, float] = field(default_factory=dict)
    """Log-probs (nats) of the likeliest first tokens; empty unless the request asks for them (``logprobs``)."""


class ReplyCache:
    """Replies on disk, one file each, shared by processes and runs; a kill leaves whole files only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # `atomic_write` reads the umask by setting it, which two threads must not do at once
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """The reply, or None: one that cannot be read, or is empty, is asked for again and replaced."""
        try:
            reply = Reply(**parse_json(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        # Empty is also what some gateways send for a failure of theirs, with status 200.
        return replace(reply, cached=True) if _is_reply(reply) and reply.text else None

    def put(self, key: str, reply: Reply) -> None:
        """Raises: OSError if it cannot be written."""
        with self._lock, atomic_write(self._path(key)) as file:
            file.write_text(json.dumps(asdict(reply)), encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


def parse_reply(content: bytes) -> Reply | None:
    """The reply in a chat completion; None if it is none (a proxy's page, say)."""
    try:
        data = parse_json(content.decode("utf-8-sig"), twice=True)
        choice = data["choices"][0]
        text = _text(choice["message"].get("content"))
        usage = data.get("usage") or {}
        prompt_tokens, completion_tokens = (
            _count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")
        )
        finish = choice.get("finish_reason")
        logprobs = choice.get("logprobs")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if text is None:
        return None
    reason = finish if isinstance(finish, str) else None
    return Reply(
        text, reason, prompt_tokens, completion_tokens, top_logprobs=_first_token(logprobs)
    )


def _text(content: Any) -> str | None:
    """What a message says: its text, or that of its parts; None for what is neither."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _count(value: Any) -> int:
    """Tokens as a server counts them; 0 where it says nothing that is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 < value < _MOST_TOKENS else 0


def _is_reply(reply: Reply) -> bool:
    counts = (reply.prompt_tokens, reply.completion_tokens)
    return (
        isinstance(reply.text, str)
        and isinstance(reply.finish_reason, str | None)
        and all(type(count) is int for count in counts)
        and isinstance(reply.top_logprobs, dict)
        and all(isinstance(value, int | float) for value in reply.top_logprobs.values())
    )


def _first_token(logprobs: Any) -> dict[str, float]:
    """Log-prob by token of the first position; of two tokens that read alike the likelier. Empty if none came.

    Another protocol's shape is none, too: whoever needs log-probs counts that, and no retry would change it.
    """
    found: dict[str, float] = {}
    try:
        for top in logprobs["content"][0]["top_logprobs"]:
            token, value = str(top["token"]), float(top["logprob"])
            if not math.isnan(value):
                found[token] = max(value, found.get(token, value))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return {}
    return found


def reply_key(model: str, messages: Messages, sampling: Mapping[str, Any]) -> str:
    content = [_KEY_VERSION, model, list(map(dict, messages)), dict(sampling)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
