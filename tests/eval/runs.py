"""Models, examples and judges for evaluations that run whole, made in place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer


def write_chat_model(
    directory: Path, *, seed: int = 0, chat: str | None = "chatml", **config: Any
) -> Path:
    """A small random Llama with a chat template; the same for the same arguments."""
    tokenizer = make_tokenizer(chat)
    settings = {"max_position_embeddings": 256, **config}
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=seed, **settings)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def problems(count: int) -> list[dict[str, str]]:
    """Sums as GSM8K has its problems."""
    return [
        {"question": f"What is {n} + {n * 7 % 5}?", "answer": f"So it is #### {n + n * 7 % 5}"}
        for n in range(count)
    ]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
