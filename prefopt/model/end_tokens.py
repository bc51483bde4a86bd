"""Where a response ends: the one place that says so for sampling, for evaluation and for what is saved.

The token that ends a turn is the chat template's, and a base model's own end is another: a model that is saved
with the latter alone never stops in `generate` or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel

from prefopt.data.render import Renderer
from prefopt.errors import DataError

GENERATION_FILE = "generation_config.json"
_KEY = "eos_token_id"


def end_token_ids(tokenizer: Any, *more: Iterable[int]) -> tuple[int, ...]:
    """All that ends a response to text or, where there is a chat template, to messages; and ``more``.

    Args:
        more: what data was seen to end with, what the model itself says.
    """
    found = {token for ids in more for token in ids}
    try:
        found |= {*Renderer(tokenizer).stop_ids(chat=tokenizer.chat_template is not None)}
    except (
        DataError
    ):  # a template that takes no question and answer: the data says what it ends with
        found |= {tokenizer.eos_token_id} - {None}
    return tuple(sorted(found))


def own_end_ids(model: Any) -> tuple[int, ...]:
    """What a loaded model's generation settings end with; nothing for a model that does not generate."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = getattr(base, "generation_config", None)
    config = base.config.get_text_config(decoder=True)
    own = getattr(settings, _KEY, None)
    return _listed(getattr(config, _KEY, None) if own is None else own)


def saved_end_ids(directories: Iterable[Path]) -> tuple[int, ...]:
    """What the files of the first directory that says so end with (`Source.from_the_top`)."""
    for directory in directories:
        for name in (GENERATION_FILE, "config.json"):
            own = _read(directory / name)
            if own:
                return own
    return ()


def add_end_tokens(model: Any, ids: Iterable[int]) -> None:
    """Makes ``ids`` part of what a model's generation settings end with, which are saved with it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.can_generate():
        return
    ends = list(dict.fromkeys([*own_end_ids(base), *ids]))
    base.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def write_end_tokens(model: Any, directory: Path) -> None:
    """Writes what an adapter's policy ends with beside the adapter, whose base knows nothing of it."""
    if model.get_base_model().can_generate():
        text = json.dumps({_KEY: list(own_end_ids(model))})
        (directory / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> tuple[int, ...]:
    try:
        return _listed(json.loads(path.read_text(encoding="utf-8")).get(_KEY))
    except (OSError, ValueError, AttributeError):
        return ()  # whoever loads the model says what is wrong with its files


def _listed(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(each for each in values if isinstance(each, int))
