"""Prompts made from a template: the text changes, the shape (plain text or messages) stays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.rows import Row, user_fields
from prefopt.errors import ConfigError
from prefopt.signals.judge import read_template as read_judge_template


def read_template(path: str | None, default: str, placeholders: Sequence[str], setting: str) -> str:
    """The text of a template file, or ``default``. Raises: ConfigError naming ``setting``."""
    return read_judge_template(path, default, placeholders, setting, ConfigError)


def template_basis(text: str) -> dict[str, str]:
    """What a stage's output depends on: the template's own bytes, wherever it came from."""
    return {"template": hashlib.sha256(text.encode()).hexdigest()}


def with_prompt_text(row: Row, text: str) -> Row:
    """A prompt row that asks ``text``: plain where the row's prompt is plain, else as one user message."""
    prompt: Any = text if isinstance(row["prompt"], str) else [{"role": "user", "content": text}]
    return {"id": row["id"], "prompt": prompt, **user_fields(row)}
