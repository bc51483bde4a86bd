"""Prompts for rollouts: rendered by the one renderer, with the columns that signals check against."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefopt.data.chunks import Limits, check
from prefopt.data.formats import Reading, canonical, prompt_reading, prompt_row, resolve
from prefopt.data.readers import RawRow
from prefopt.data.render import Rendered, Renderer, Request, conditioned
from prefopt.data.rows import Message, Refused, Reject, Row, column, has_column, row_id
from prefopt.data.sources import first_rows, open_source, source_name
from prefopt.data.tokens import require_rows
from prefopt.errors import DataError
from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.schema import ConditionSection, DataSection, SourceSection
from prefopt.recipe.scored_rows import columns_named, columns_read, reads_source, unjudged
from prefopt.types import Prompt

log = logging.getLogger(__name__)

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, and what was refused on the way."""

    prompts: tuple[Prompt, ...]
    rejects: tuple[dict[str, Any], ...]
    """One line a refused row: source, id, file, row, reason, lengths in tokens."""
    fingerprint: str
    """SHA-256 of the prompts' ids, of the offline responses and of the fields."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def reject_counts(self) -> dict[str, int]:
        return dict(Counter(line["reason"] for line in self.rejects))


def load_prompts(
    sections: Sequence[SourceSection],
    data: DataSection,
    renderer: Renderer,
    *,
    max_new_tokens: int,
    signals: Sequence[BoundSignal] = (),
    needs_offline: bool = False,
    condition: ConditionSection | None = None,
) -> PromptSet:
    """The prompts of ``sections``; each must leave ``max_new_tokens`` of room in ``data.max_length_tokens``.

    A row's ``chosen`` column, where it has one, becomes the prompt's offline response. Source weights and
    ``drop_ties`` do not apply: every prompt is met once an epoch.

    Args:
        signals: what will score the answers. A row without a column that a signal for it reads is an error that
            names it; one that no signal judges is rejected (`no_signal`).
        needs_offline: every row must have a response of its own.
        condition: write its target reward into every prompt.

    Raises: DataError, ConfigError, ModelError as `load_data` does; DataError if no prompt is left.
    """
    prompts: list[Prompt] = []
    rejects: list[dict[str, Any]] = []
    limits = Limits(data.max_length_tokens, data.max_prompt_tokens)
    for section in sections:
        reader = _Reader(
            section, renderer, limits, max_new_tokens, tuple(signals), needs_offline, condition
        )
        for result in reader.rows():
            if isinstance(result, Prompt):
                prompts.append(result)
            else:
                rejects.append({"source": section.path, **result})
    by_source = reads_source(signals)
    found = PromptSet(tuple(prompts), tuple(rejects), _fingerprint(prompts, by_source=by_source))
    _warn_of_unjudged(found)
    require_rows(len(prompts), "data.prompts", found.reject_counts)
    return found


@dataclass(frozen=True)
class _Reader:
    section: SourceSection
    renderer: Renderer
    limits: Limits
    max_new_tokens: int
    signals: tuple[BoundSignal, ...]
    needs_offline: bool
    condition: ConditionSection | None

    def rows(self) -> Iterator[Prompt | dict[str, Any]]:
        """Each row as a prompt, or as the line that says why it is refused."""
        kept = self.section.control_tokens
        self.renderer.controls.require_known(kept, f"data.prompts: {self.section.path}: ")
        source = open_source(self.section)
        first = next(first_rows(source, 1), None)
        if first is None:
            raise DataError(f"data: {self.section.path}: holds no rows")
        reading, has_response = self._reading(first)
        batch: list[RawRow] = []
        for row in first_rows(source, self.section.max_rows):
            batch.append(row)
            if len(batch) == _BATCH_ROWS:
                yield from self._batch(batch, reading, has_response)
                batch = []
        yield from self._batch(batch, reading, has_response)

    def _reading(self, first: RawRow) -> tuple[Reading, bool]:
        """How to read the source, and whether its rows have a response."""
        has_response = has_column(first.data, self.section.columns.chosen)
        if self.needs_offline and not has_response:
            column(first, self.section.columns.chosen)  # raises, naming the columns there are
        section = self.section.model_copy(update={"drop_ties": False})
        if has_response:
            return resolve(section, first, pairs=False), True
        return prompt_reading(section, first), False

    def _batch(
        self, rows: Sequence[RawRow], reading: Reading, has_response: bool
    ) -> Iterator[Prompt | dict[str, Any]]:
        read = self._with_response if has_response else prompt_row
        found = [self._judged(row, self._conditioned(read(row, reading))) for row in rows]
        requests = [
            Request(row.prompt, row.responses, options=row.options)
            for row in found
            if isinstance(row, Row)
        ]
        rendered = iter(self.renderer.render_batch(requests))
        for raw, row in zip(rows, found, strict=True):
            result = next(rendered) if isinstance(row, Row) else row
            result = self._checked(result)
            if isinstance(result, Refused) or isinstance(row, Refused):
                yield self._line(raw, reading, result)
            else:
                yield self._prompt(raw, reading, row, result)

    def _with_response(self, row: RawRow, reading: Reading) -> Row | Refused:
        """The row; one whose prompt is answered already gives its question, where no response is needed."""
        found = canonical(row, reading)
        answered = isinstance(found, Refused) and found.reason is Reject.PROMPT_ANSWERED
        return prompt_row(row, reading) if answered and not self.needs_offline else found

    def _conditioned(self, row: Row | Refused) -> Row | Refused:
        if self.condition is None or isinstance(row, Refused):
            return row
        condition = self.condition
        prompt = conditioned(row.prompt, condition.template, condition.target)
        return replace(row, prompt=prompt, source_prompt=row.prompt)

    def _judged(self, raw: RawRow, row: Row | Refused) -> Row | Refused:
        """The row, or that no signal is for it: whatever is answered teaches nothing."""
        if isinstance(row, Refused):
            return row
        why = unjudged(self.signals, raw.data, source_name(self.section))
        return row if why is None else Refused(Reject.NO_SIGNAL, why)

    def _checked(self, result: Rendered | Refused) -> Rendered | Refused:
        """``result``, or why it cannot be a prompt. Too long a response is only a missing one."""
        if isinstance(result, Refused):
            return result
        prompt = len(result.prompt_ids)
        most = self.limits.max_length - self.max_new_tokens
        if prompt > min(most, self.limits.max_prompt or most):
            return Refused(Reject.PROMPT_TOO_LONG, lengths=(prompt,))
        if prompt == 0:
            return Refused(Reject.EMPTY_PROMPT)
        if not result.responses:
            return result
        checked = check(result, self.limits)
        if isinstance(checked, Refused) and not self.needs_offline:
            return replace(result, responses=())
        return checked

    def _prompt(self, raw: RawRow, reading: Reading, row: Row, rendered: Rendered) -> Prompt:
        source, named = source_name(self.section), columns_named(self.signals)
        for name in columns_read(self.signals, raw.data, source):
            column(raw, name)  # a signal reads it: raises, naming the columns there are
        columns = reading.columns
        own = {columns.prompt, columns.chosen, columns.rejected, columns.system}
        return Prompt(
            id=row_id(raw, columns.id),
            ids=rendered.prompt_ids,
            # What signals judge by is the prompt itself, without the reward that the policy is asked for.
            content=_content(row.prompt if row.source_prompt is None else row.source_prompt),
            fields={k: v for k, v in raw.data.items() if k not in own or k in named},
            given=row.options.given,
            offline_ids=rendered.responses[0] if rendered.responses else None,
            opened=self.renderer.opened_by(rendered.prompt_ids),
            source=source,
        )

    def _line(self, raw: RawRow, reading: Reading, result: Rendered | Refused) -> dict[str, Any]:
        assert isinstance(result, Refused)
        line: dict[str, Any] = {
            "id": row_id(raw, reading.columns.id),
            "file": raw.file,
            "row": raw.number,
            "reason": str(result.reason),
        }
        if result.lengths is not None:
            line["lengths"] = dict(zip(("prompt", "chosen"), result.lengths, strict=False))
        if result.detail is not None:
            line["detail"] = result.detail
        return line


def _content(prompt: str | list[Message]) -> str | tuple[Message, ...]:
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _warn_of_unjudged(found: PromptSet) -> None:
    lines = [line for line in found.rejects if line["reason"] == Reject.NO_SIGNAL]
    if lines:
        total = len(found.prompts) + len(found.rejects)
        log.warning(
            "data.prompts: no signal is for %d of %d rows, which are left out (%s); the first, %s: %s",
            len(lines), total, Reject.NO_SIGNAL, lines[0]["id"], lines[0]["detail"],
        )  # fmt: skip


def _fingerprint(prompts: Sequence[Prompt], *, by_source: bool) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        row: list[Any] = [prompt.id, prompt.ids, prompt.offline_ids, prompt.fields]
        if by_source:
            row.append(prompt.source)
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
