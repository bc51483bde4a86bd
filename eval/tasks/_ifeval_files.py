"""IFEval's prompts with their instructions, and files of responses to them. Keyed by prompt, never by line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.harness_samples import unwrapped
from eval.sources import benchmark_rows, columns, file_rows, require, text_key
from prefopt.data.readers import RawRow
from prefopt.data.rows import shown
from prefopt.errors import ConfigError, DataError
from prefopt.signals.instructions import Instruction, instruction

OPTION = "tasks.ifeval.data"
_HUB = "google/IFEval"


@dataclass(frozen=True)
class Item:
    """One prompt and what it instructs."""

    key: str
    prompt: str
    instructions: tuple[Instruction, ...]
    where: str
    """File and line."""

    @property
    def ids(self) -> list[str]:
        return [each.id for each in self.instructions]


@dataclass(frozen=True)
class Response:
    """A model's response to one prompt."""

    item: Item
    text: str | None
    """None: the file has null."""
    source: str
    """Where its instructions come from, in words."""
    missing: bool = False
    """True: the file has no row for this prompt."""


class _Published:
    """The benchmark's prompts, to be found by prompt or key.

    Args:
        items: in order, keys and prompts unique.
        source: where they come from, in words.
    """

    def __init__(self, items: Sequence[Item], source: str) -> None:
        self.items = items
        self.source = source
        self.by_prompt = {item.prompt.strip(): item for item in items}
        self.by_key = {item.key: item for item in items}

    def of(self, row: RawRow) -> Item:
        """The item of a response: by its prompt, or by its key where the row has no prompt.

        Raises: DataError if there is none, or the row says that it instructs something else.
        """
        if row.data.get("prompt") is None:
            key = str(require(row, "key", "prompt"))
            item, what = self.by_key.get(key), f"key {key}"
        else:
            prompt = str(row.data["prompt"]).strip()
            item, what = self.by_prompt.get(prompt), f"prompt {prompt[:80]!r}"
        if item is None:
            raise DataError(
                f"{row.where}: {what} is none of the {len(self.items)} prompts of {self.source}"
            )
        ids = row.data.get("instruction_id_list")
        if ids is not None and ids != item.ids:
            said = ", ".join(map(str, ids)) if isinstance(ids, list) else shown(ids)
            raise DataError(
                f"{row.where}: prompt {item.key}: its instructions are {said}, but those of "
                f"{self.source} are {', '.join(item.ids)}: another version of the benchmark?"
            )
        return item


def items_of(data: str | None) -> list[Item]:
    """The benchmark's prompts, of the file ``data`` or of the hub.

    Raises: DataError naming file and line; ConfigError if there is neither.
    """
    return _items(benchmark_rows(OPTION, data, hub=_HUB, split="train"))


def read_responses(path: Path, data: str | None) -> dict[str, list[Response]]:
    """Responses by model (``""`` in a file without that column), in the benchmark's order.

    Where all rows say themselves what they instruct and ``data`` is not set, nobody knows which are missing.

    Raises: DataError naming file, line and key: a second response to a prompt, a prompt of another benchmark,
        other instructions than the benchmark's.
    """
    rows = unwrapped(file_rows(path))
    own = data is None and all(map(_has_instructions, rows))
    published = None if own else _find_published(path, data)
    source = published.source if published else "the file's own rows"
    by_model: dict[str, dict[str, Response]] = {}
    where: dict[tuple[str, str], str] = {}
    for row in rows:
        item = published.of(row) if published else _item(row)
        model = str(row.data.get("model") or "")
        first = where.setdefault((model, item.key), row.where)
        if first != row.where:
            raise DataError(
                f"{row.where}: a second response to prompt {item.key}; the first is at {first}. Keep one of them"
            )
        by_model.setdefault(model, {})[item.key] = Response(item, _text(row), source)
    return {model: _in_order(found, published) for model, found in by_model.items()}


def _in_order(found: Mapping[str, Response], published: _Published | None) -> list[Response]:
    if published is None:
        return list(found.values())
    return [
        found.get(item.key) or Response(item, None, published.source, missing=True)
        for item in published.items
    ]


def _find_published(path: Path, data: str | None) -> _Published:
    """What the responses in ``path`` answer: of ``data``, else of a file beside it, else of the hub.

    Raises: ConfigError if several files beside it could be meant, or the hub is not to be had.
    """
    if data is not None:
        return _Published(items_of(data), Path(data).name)
    beside = sorted(each for each in path.parent.glob("input_data*.jsonl") if each != path)
    exact = [each for each in beside if each.name == "input_data.jsonl"]
    if len(beside) > 1 and not exact:
        names = ", ".join(each.name for each in beside)
        raise ConfigError(
            f"{path}: its rows do not say what they instruct, and several files beside it could: {names}. "
            f"Name one: {OPTION}=PATH"
        )
    if beside:
        file = (exact or beside)[0]
        return _Published(_items(file_rows(file)), f"{file.name} beside the file")
    return _Published(items_of(None), f"hub {_HUB}")


def _items(rows: Iterable[RawRow]) -> list[Item]:
    """Raises: DataError for two rows with one key or prompt, both lines named."""
    items = [_item(row) for row in rows]
    for what in ("key", "prompt"):
        first: dict[str, Item] = {}
        for item in items:
            value = getattr(item, what).strip()
            if value in first:
                raise DataError(
                    f"{item.where}: a second row with {what} {value[:80]!r}; the first is at "
                    f"{first[value].where}. Keep one of them"
                )
            first[value] = item
    return items


def _item(row: RawRow) -> Item:
    prompt = str(require(row, "prompt"))
    key = row.data.get("key")
    return Item(
        text_key(prompt) if key is None else str(key), prompt, _instructions(row), row.where
    )


def _instructions(row: RawRow) -> tuple[Instruction, ...]:
    ids, given = require(row, "instruction_id_list"), require(row, "kwargs")
    if not isinstance(ids, Sequence) or not isinstance(given, Sequence) or len(ids) != len(given):
        raise DataError(
            f"{row.where}: instruction_id_list and kwargs must be lists of one length: ids and arguments"
        )
    if not ids:
        raise DataError(f"{row.where}: instruction_id_list is empty: nothing to check")
    return tuple(_instruction(row, id, each) for id, each in zip(ids, given, strict=True))


def _instruction(row: RawRow, id: Any, given: Any) -> Instruction:
    if not isinstance(given, Mapping | None):
        raise DataError(f"{row.where}: kwargs of {id} must be an object, got {given!r}")
    try:
        return instruction(str(id), given)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from error


def _has_instructions(row: RawRow) -> bool:
    return row.data.get("instruction_id_list") is not None and row.data.get("kwargs") is not None


def _text(row: RawRow) -> str | None:
    if "response" not in row.data:
        raise DataError(f"{row.where}: no column 'response'; its columns: {columns(row)}")
    text = row.data["response"]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{row.where}: response must be text or null, got {text!r}")
    return text
