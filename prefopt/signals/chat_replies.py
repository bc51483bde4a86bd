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
_ROUNDED_ONE = 1e-3
"""The log-prob of a certain token, as half-precision arithmetic may round it."""


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
        return replace(reply, cached=True) if _is_reply(reply) and _says_something(reply) else None

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply with text. Raises: OSError if it cannot be written."""
        if not _says_something(reply):
            return
        with self._lock, atomic_write(self._path(key)) as file:
            file.write_text(json.dumps(asdict(reply)), encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


def parse_reply(content: bytes) -> Reply | None:
    """The reply in a chat completion; None if it is none (a proxy's page, say)."""
    try:
        data = parse_json(content.decode("utf-8-sig"), twice=True)
        choice = _first_choice(data["choices"])
        text = _text(choice["message"].get("content"))
        given = data.get("usage")
        usage = given if isinstance(given, dict) else {}
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


def no_reply(content: bytes, content_type: str | None) -> tuple[str, bool]:
    """What stands in the place of a chat completion, and whether it is one without a choice that can be read.

    The latter is what many endpoints say of a prompt that they will not answer; anything else may pass.
    """
    start = repr(content[:100].decode("utf-8", "replace"))
    try:
        data = parse_json(content.decode("utf-8-sig"), twice=True)
    except ValueError:
        return f"{content_type or 'no content type'}, {start}", False
    if not isinstance(data, dict) or "choices" not in data:
        return f"JSON without choices, {start}", False
    choices = data["choices"]
    if not isinstance(choices, list) or not choices:
        return f"choices is {json.dumps(choices)[:100]}", True
    return f"a choice without a message that has text, {json.dumps(choices[0])[:100]}", True


def _first_choice(choices: Any) -> Any:
    """The choice of index 0, wherever it stands; the first where none says."""
    numbered = (each for each in choices if isinstance(each, dict) and each.get("index") == 0)
    return next(numbered, choices[0])


def _says_something(reply: Reply) -> bool:
    """Nothing is also what some gateways send for a failure of theirs, with status 200."""
    return bool(reply.text.strip())


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

    Another protocol's shape is none, too, and so are values of which one is no log-prob (NaN, above 0): whoever
    needs log-probs counts that, and no retry would change it.
    """
    found: dict[str, float] = {}
    try:
        for top in logprobs["content"][0]["top_logprobs"]:
            token, value = str(top["token"]), top["logprob"]
            if isinstance(value, bool) or not value <= _ROUNDED_ONE:
                return {}
            found[token] = max(float(value), found.get(token, -math.inf))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return {}
    return found


def reply_key(model: str, messages: Messages, sampling: Mapping[str, Any]) -> str:
    content = [_KEY_VERSION, model, list(map(dict, messages)), dict(sampling)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
