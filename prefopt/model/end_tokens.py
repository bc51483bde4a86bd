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
from prefopt.storage.json_text import parse_json

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
    """What the makers of a loaded model say that it ends with, in its generation settings."""
    settings = getattr(_base(model), "generation_config", None)
    # Settings derived from the model's configuration say what its class does by default: of another vocabulary.
    if settings is None or settings._from_model_config:
        return ()
    return _listed(getattr(settings, _KEY, None))


def saved_end_ids(directories: Iterable[Path]) -> tuple[int, ...]:
    """As `own_end_ids`, of the first directory that says so (`Source.from_the_top`)."""
    for directory in directories:
        try:
            settings = parse_json((directory / GENERATION_FILE).read_text(encoding="utf-8"))
            own = () if settings.get("_from_model_config") else _listed(settings.get(_KEY))
        except (OSError, ValueError, AttributeError):
            continue  # whoever loads the model says what is wrong with its files
        if own:
            return own
    return ()


def add_end_tokens(model: Any, ids: Iterable[int]) -> None:
    """Makes ``ids`` part of what a model's generation settings end with, which are saved with it."""
    base = _base(model)
    if not base.can_generate():
        return
    settings = base.generation_config
    known = getattr(settings, _KEY, None)
    if known is None:
        known = getattr(base.config.get_text_config(decoder=True), _KEY, None)
    ends = list(dict.fromkeys([*_listed(known), *ids]))
    if ends and ends != list(_listed(settings.eos_token_id)):
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
        settings._from_model_config = False  # else a version of transformers may derive them anew


def write_end_tokens(model: Any, directory: Path) -> None:
    """Writes what an adapter's policy ends with beside the adapter, whose base knows nothing of it."""
    base = _base(model)
    if base.can_generate():
        text = json.dumps({_KEY: list(_listed(base.generation_config.eos_token_id))})
        (directory / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _listed(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool))
