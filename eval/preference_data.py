"""Pairs and prompts as examples: every format that training reads, refused rows kept and counted."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from eval.base import Example, Message
from eval.sources import file_rows, keyed, source_at, text_key
from prefopt.data.formats import canonical, prompt_reading, prompt_row, resolve
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, Row, has_column, shown
from prefopt.data.rows import column as column_value
from prefopt.data.sources import first_rows, open_source
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, SourceSection

Format = Literal["auto", "text", "chat", "hh", "sharegpt"]
Response = str | Message
SCORE_COLUMNS = tuple(
    pair
    for name in ("score", "reward", "rating", "scores", "rewards")
    for pair in ((f"{name}_chosen", f"{name}_rejected"), (f"chosen_{name}", f"rejected_{name}"))
)
"""What files call the scores of the two sides, where ``columns`` does not say."""


@dataclass(frozen=True)
class PromptRows:
    """Prompts, and how many rows gave none, by reason."""

    examples: list[Example]
    refused: Mapping[str, int] = field(default_factory=dict)


def source_section(
    task: str,
    data: str,
    *,
    format: Format = "auto",
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
) -> SourceSection:
    """A task's options as the section of a recipe that training would read the same rows with.

    Raises: ConfigError for a key that is no column.
    """
    read_by = {"format": format, "columns": column_map(task, columns or {}), "split": split}
    return source_at(f"tasks.{task}.data", path=data, **read_by)


def option_sections(
    task: str,
    data: str | None,
    *,
    format: Format,
    columns: Mapping[str, str | None] | None,
    split: str | None,
) -> list[SourceSection] | None:
    """The source that a task's options name; None where it is to come from the evaluated run.

    Raises: ConfigError for options that say how to read a file that is not given.
    """
    if data is not None:
        return [source_section(task, data, format=format, columns=columns, split=split)]
    given = {"format": format if format != "auto" else None, "columns": columns, "split": split}
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise ConfigError(
            f"tasks.{task}.{name} = {given[name]!r}: would be ignored: it says how to read tasks.{task}.data, "
            "which is not given (a run's own held-out data says so itself)"
            for name in ignored
        )
    return None


def column_map(task: str, columns: Mapping[str, str | None]) -> ColumnMap:
    """A task's ``columns`` option. Raises: ConfigError for a key that is no column."""
    try:
        return ColumnMap.model_validate(dict(columns))
    except ValidationError as error:
        known = ", ".join(ColumnMap.model_fields)
        raise ConfigError(
            f"tasks.{task}.columns.{'.'.join(map(str, item['loc']))} = {item['input']!r}: {item['msg']}; a "
            f"column name for any of {known}"
            for item in error.errors()
        ) from error


def held_out_sections(task: str, recipe: Mapping[str, Any]) -> list[SourceSection]:
    """The sections of ``data.eval`` in a run's recipe: what it held out.

    Raises: ConfigError for a run that held out none, or a share of its training rows.
    """
    data: Any = recipe.get("data") or {}
    sections = data.get("eval") or []
    if not sections:
        share = data.get("eval_frac")
        why = f"it held out eval_frac = {share} of its training rows" if share else "it has none"
        raise ConfigError(
            f"tasks.{task}.data is missing, and the run names no data.eval ({why}). Give a file of pairs: "
            f"tasks.{task}.data=PATH"
        )
    return [SourceSection.model_validate(section) for section in sections]


def pair_examples(sections: Sequence[SourceSection]) -> list[Example]:
    """Every row of the sources, in order: ``fields`` has ``chosen``, ``rejected``, ``scores``, ``refused``.

    A row that training would refuse (identical sides, no prompt, …) is an example with that reason in
    ``refused`` and empty sides. ``scores`` are those of the data, None where there is none. Keys are made of
    the texts, so that they do not depend on the file's name or order; a repeated row gets a number.

    Raises: DataError naming file, row and column; ConfigError for settings that contradict each other.
    """
    found = [_pair(*each) for section in sections for each in _pair_rows(section)]
    return numbered(found)


def prompt_examples(sections: Sequence[SourceSection]) -> PromptRows:
    """The prompts of files of prompts or pairs, each text once. Keys as in `pair_examples`.

    Raises: DataError naming file, row and column, or if no prompt is left.
    """
    found: dict[str, Example] = {}
    refused: Counter[str] = Counter()
    for section in sections:
        for row in _prompt_rows(section):
            if isinstance(row, Refused):
                refused[str(row.reason)] += 1
                continue
            prompt = row.prompt if isinstance(row.prompt, str) else tuple(row.prompt)
            given = row.options.given
            key = _key([prompt, given] if given else prompt)
            refused["repeated_prompt"] += key in found
            found.setdefault(key, Example(key, prompt, options=row.options))
    if not found:
        paths = ", ".join(section.path for section in sections)
        raise DataError(f"{paths}: no prompt is left; refused: {dict(refused)}")
    return PromptRows([*found.values()], {name: count for name, count in refused.items() if count})


class TaskPrompts:
    """The prompts of a task: of the file that its options name, else of what the evaluated run held out."""

    def __init__(self, task: str, sections: list[SourceSection] | None) -> None:
        self.task = task
        self.sections = sections

    def adopt_run(self, recipe: Mapping[str, Any]) -> None:
        """Takes those that the run held out where no ``data`` was given."""
        if self.sections is None:
            self.sections = held_out_sections(self.task, recipe)

    @functools.cached_property
    def rows(self) -> PromptRows:
        """Read once. Raises: ConfigError if there is no file to read; as `prompt_examples`."""
        if self.sections is None:
            raise ConfigError(
                f"tasks.{self.task}.data is missing, and MODEL is no run with held-out data: give a file of "
                f"prompts, tasks.{self.task}.data=PATH"
            )
        return prompt_examples(self.sections)

    def refused_counts(self) -> dict[str, int]:
        """Rows that gave no prompt, by reason; none where nothing is read, as `prefopt eval score` does."""
        refused = self.rows.refused if self.sections else {}
        return {f"num_refused_{reason}": count for reason, count in refused.items()}


def scored_pairs(path: Path, columns: ColumnMap) -> dict[str, list[Example]]:
    """The pairs of a published file of scores, by its ``model`` column (``""`` without one).

    Nothing is refused for its texts, which may be missing: the file has scored them. Keys are its ids, else
    made of the texts, else of the row's place.

    Raises: DataError for a file without score columns, a score that is no number, or an id that comes twice.
    """
    rows = file_rows(path)
    names = score_columns(columns, rows[0]) if rows else None
    if names is None:
        usual = ", ".join("/".join(pair) for pair in SCORE_COLUMNS[:4])
        raise DataError(
            f"{path}: no columns with the two sides' scores ({usual}, …); it has: "
            f"{', '.join(rows[0].data) if rows else 'no rows'}. Name them: columns.score_chosen=…, "
            "columns.score_rejected=…"
        )
    id_column = columns.id or next((name for name in ("id", "key") if name in rows[0].data), None)
    by_model: dict[str, list[RawRow]] = {}
    for raw in rows:
        by_model.setdefault(str(raw.data.get("model") or ""), []).append(raw)
    found = {}
    for model, each in by_model.items():
        if id_column is not None:
            keyed(each, lambda data: data.get(id_column), "pair", id_column)
        found[model] = numbered(_scored_pair(raw, columns, names, id_column) for raw in each)
    return found


def response_text(response: Response) -> str:
    """What a side says."""
    return response if isinstance(response, str) else str(response.get("content") or "")


def numbered(examples: Iterable[Example]) -> list[Example]:
    """The examples with unique keys: the second of a key gets ``#2``."""
    seen: Counter[str] = Counter()
    result = []
    for example in examples:
        seen[example.key] += 1
        number = seen[example.key]
        key = example.key if number == 1 else f"{example.key}#{number}"
        result.append(dataclasses.replace(example, key=key))
    return result


def score_columns(columns: ColumnMap, first: RawRow) -> tuple[str, str] | None:
    """The columns with the two sides' scores: as named, else the first usual pair that the row has."""
    if columns.score_chosen is not None and columns.score_rejected is not None:
        return columns.score_chosen, columns.score_rejected
    has = first.data
    return next((pair for pair in SCORE_COLUMNS if all(has_column(has, c) for c in pair)), None)


def scores_of(row: RawRow, columns: tuple[str, str] | None) -> tuple[float | None, float | None]:
    """The two scores; None for one that is missing, null or not finite.

    Raises: DataError for a value that is no number, naming row and column.
    """
    if columns is None:
        return None, None
    chosen, rejected = (_number(row, name) for name in columns)
    return chosen, rejected


def _scored_pair(
    raw: RawRow, columns: ColumnMap, names: tuple[str, str], id_column: str | None
) -> Example:
    texts = [
        _last_text(column_value(raw, name)) if name and has_column(raw.data, name) else None
        for name in (columns.chosen, columns.rejected)
    ]
    if id_column is not None:
        key = str(column_value(raw, id_column))
    else:
        prompt = raw.data.get(columns.prompt or "prompt")
        key = raw.where if None in texts else _key([prompt, *texts])
    chosen, rejected = (text or "" for text in texts)
    scores = scores_of(raw, names)
    fields = {"chosen": chosen, "rejected": rejected, "scores": scores, "refused": None}
    return Example(key, "", fields)


def _last_text(value: Any) -> str | None:
    """A side as text: itself, or what the last of its messages says."""
    last = value[-1] if isinstance(value, list) and value else value
    if isinstance(last, Mapping):
        last = last.get("content", last.get("value"))
    return last if isinstance(last, str) else None


def _number(row: RawRow, name: str) -> float | None:
    found = column_value(row, name) if has_column(row.data, name) else None
    # reward models' outputs are often saved as they came: a list of one
    value: Any = found[0] if isinstance(found, list) and len(found) == 1 else found
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{row.where}: column {name!r} = {shown(value)} is no number") from error
    return number if math.isfinite(number) else None


def _pair_rows(
    section: SourceSection,
) -> Iterator[tuple[RawRow, Row | Refused, tuple[str, str] | None]]:
    source, first = _opened(section)
    names = score_columns(section.columns, first)
    # Scores are read here and leniently: a missing one is counted, and never stops the file.
    if not section.drop_ties:
        columns = section.columns.model_copy(update={"score_chosen": None, "score_rejected": None})
        section = section.model_copy(update={"columns": columns})
    reading = resolve(section, first, pairs=True)
    for raw in first_rows(source, section.max_rows):
        yield raw, canonical(raw, reading), names


def _pair(raw: RawRow, row: Row | Refused, names: tuple[str, str] | None) -> Example:
    scores = scores_of(raw, names)
    if isinstance(row, Refused):
        key = text_key(json.dumps(raw.data, sort_keys=True, default=str))
        return Example(
            key, "", {"chosen": "", "rejected": "", "scores": scores, "refused": str(row.reason)}
        )
    prompt = row.prompt if isinstance(row.prompt, str) else tuple(row.prompt)
    chosen, rejected = row.responses
    fields = {"chosen": chosen, "rejected": rejected, "scores": scores, "refused": None}
    given = row.options.given
    key = _key([prompt, chosen, rejected, *([given] if given else [])])
    return Example(key, prompt, fields, options=row.options)


def _prompt_rows(section: SourceSection) -> Iterator[Row | Refused]:
    source, first = _opened(section)
    section = section.model_copy(update={"drop_ties": False})  # every prompt counts, tied or not
    # As rollouts read prompts: where rows have an answer, its shape says whether the prompt is chat.
    if has_column(first.data, section.columns.chosen):
        read, reading = canonical, resolve(section, first, pairs=False)
    else:
        read, reading = prompt_row, prompt_reading(section, first)
    for raw in first_rows(source, section.max_rows):
        yield read(raw, reading)


def _opened(section: SourceSection) -> tuple[Any, RawRow]:
    source = open_source(section)
    first = next(first_rows(source, 1), None)
    if first is None:
        raise DataError(f"{section.path}: holds no rows")
    return source, first


def _key(value: Any) -> str:
    return text_key(json.dumps(value, sort_keys=True, ensure_ascii=False))
