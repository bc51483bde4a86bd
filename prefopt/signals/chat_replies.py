"""Replies of chat endpoints: what is read in them, and where they are kept."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.storage.cache import atomic_write

Messages = Sequence[Mapping[str, Any]]
_KEY_VERSION = 1


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
            reply = Reply(**json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        # Empty is also what some gateways send for a failure of theirs, with status 200.
        return replace(reply, cached=True) if reply.text else None

    def put(self, key: str, reply: Reply) -> None:
        """Raises: OSError if it cannot be written."""
        with self._lock, atomic_write(self._path(key)) as file:
            file.write_text(json.dumps(asdict(reply)), encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


def parse_reply(content: bytes) -> Reply | None:
    """The reply in a chat completion; None if it is none (a proxy's page, say)."""
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        usage = data.get("usage") or {}
        return Reply(
            text=str(choice["message"].get("content") or ""),
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            top_logprobs=_first_token(choice.get("logprobs")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _first_token(logprobs: Any) -> dict[str, float]:
    """Log-prob by token of the first position; of two tokens that read alike the likelier. Empty if none came.

    Another protocol's shape is none, too: whoever needs log-probs counts that, and no retry would change it.
    """
    found: dict[str, float] = {}
    try:
        for top in logprobs["content"][0]["top_logprobs"]:
            token, value = str(top["token"]), float(top["logprob"])
            found[token] = max(value, found.get(token, value))
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    return found


def reply_key(model: str, messages: Messages, sampling: Mapping[str, Any]) -> str:
    content = [_KEY_VERSION, model, list(map(dict, messages)), dict(sampling)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
