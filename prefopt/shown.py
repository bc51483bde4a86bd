"""What is shown and kept of text that others wrote: no control characters on a terminal, no credentials anywhere.

Sampled text, cells of files, names of files, tokens, replies of servers: all of it is a stranger's.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import IO, Any

HIDDEN = "***"
"""What stands in the place of a credential."""

# C0 without tab and line break, DEL, C1 (0x9b begins a terminal's command in some), what turns the direction of
# writing or breaks lines without being seen, the invisible tag characters, and halves of surrogate pairs.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)

# Bounded: what is shown may be made to take long.
_NAMES = r"[\w.-]{0,40}(?:key|token|secret|passw|pwd|auth|sig|cred|session)[\w.-]{0,40}"
_USERINFO = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)"
    r"(?:[^/?#\s'\"<>]*"  # a password with a slash is wrongly written, and a password
    r"|[^/?#\s'\"<>@:]*:(?!\d{1,5}(?:[/?#\s'\"]|$))[^\s'\"<>]*)@",
    re.IGNORECASE,
)
_PARAMETER = re.compile(rf"([?&;]{_NAMES}=)[^&;#\s'\"<>]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization['\"]?\s?[:=]\s?['\"]?(?:bearer|basic)\s|\bbearer\s(?=\S{0,200}\d))[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
_SECRET_KEYS = frozenset(
    {
        "api_key", "apikey", "password", "passwd", "secret", "client_secret", "access_token", "auth_token",
        "hf_token", "authorization", "proxy_authorization", "x_api_key", "cookie",
    }
)  # fmt: skip


def visible(text: str) -> str:
    """``text`` with every character that acts on a terminal as its escape (``\\u001b``), which JSON reads as well.

    Tabs and line breaks stay, and so do the joiners that emoji and Indic scripts are written with.
    """
    return _CONTROLS.sub(_escaped, text)


def redacted(text: str) -> str:
    """``text`` with `HIDDEN` for user names, passwords and keys in its URLs, and for keys that headers bring."""
    if "://" in text:
        text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    return _HEADER.sub(rf"\1{HIDDEN}", text)


def without_credentials(value: Any) -> Any:
    """A JSON value with its texts `redacted`, and those under a key such as ``api_key`` hidden whole."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if _is_secret(key) and isinstance(each, str) else without_credentials(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(without_credentials, value))
    return value


def shown(text: str) -> str:
    """``text`` as a terminal may have it: `visible`, and `redacted`."""
    return visible(redacted(text))


def say(text: str = "", *, file: IO[str] | None = None) -> None:
    """Prints a text as it may be `shown`, to stdout unless it says."""
    print(shown(text), file=sys.stdout if file is None else file)


class ShownFormatter(logging.Formatter):
    """Of log lines: they quote names of files, replies and errors of libraries."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _is_secret(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_") in _SECRET_KEYS


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
