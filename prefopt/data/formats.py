"""From the shapes preference data comes in to the canonical row.

A format is decided once a source, on its first row (`resolve`), and then holds for every row of it:
a file that mixes shapes is an error with a line number, not a guess per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.data.messages import (
    flagged,
    is_transcript,
    kind_of,
    messages,
    refuse_media,
    refuse_written_out,
    unflagged,
)
from prefopt.data.options import RenderOptions
from prefopt.data.readers import RawRow
from prefopt.data.rows import (
    Labels,
    Message,
    Refused,
    Reject,
    Row,
    answered_turns,
    column,
    has_column,
    refusal,
    score,
)
from prefopt.data.template_columns import template_columns
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, SourceSection

_DIALOGUE_COLUMNS = ("conversations", "messages")


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read: a format that is no longer ``auto``, columns that are there."""

    format: str
    columns: ColumnMap
    """``prompt`` None: the prompt is what chosen and rejected start with."""
    pairs: bool
    """False for SFT and samples: only ``chosen`` is read."""
    drop_ties: bool = False
    labels: Labels | None = None
    """Of samples: what is read of a row beside its response."""
    rules: RenderOptions = field(default_factory=RenderOptions)
    """What the source allows of a rendering."""


def resolve(section: SourceSection, first: RawRow, *, pairs: bool) -> Reading:
    """The reading of a source, from its section and its first row.

    A ``prompt`` column left at its default and absent is looked for as ``conversations``, else taken
    to be implicit; SFT rows without ``chosen`` may hold it all in ``conversations`` or ``messages``.

    Raises: ConfigError for settings that contradict each other; DataError for a missing column.
    """
    _check(section, pairs)
    columns = _present(section.columns, first, pairs)
    form = section.format if section.format != "auto" else _detect(columns, first)
    if form == "text" and section.format == "auto":
        for name in filter(None, (columns.prompt, columns.chosen)):
            refuse_written_out(first, name, column(first, name))
    if form == "text":
        require_last_turn(section, "plain text has no turns: leave it out, or set format: chat")
        if columns.prompt is None:
            # `prompt` is what people forget to map; say which columns there are
            column(first, section.columns.prompt or "prompt")
            raise ConfigError(
                "data: columns.prompt = null: plain text has no implicit prompt; name its column"
            )
        if columns.system is not None:
            raise ConfigError(
                f"data: columns.system = {columns.system!r}: plain text has no system message; "
                "set format: chat"
            )
    return Reading(form, columns, pairs, section.drop_ties, rules=rules_of(section))


def prompt_reading(section: SourceSection, first: RawRow) -> Reading:
    """The reading of a source whose rows have a prompt and no response.

    A ``prompt`` column left at its default and absent is looked for as ``conversations`` or ``messages``.

    Raises: DataError for a missing column.
    """
    require_last_turn(section, "a prompt has no turn with loss")
    columns = section.columns
    if columns.prompt in (None, "prompt") and not has_column(first.data, "prompt"):
        dialogue = next((name for name in _DIALOGUE_COLUMNS if has_column(first.data, name)), None)
        columns = columns.model_copy(update={"prompt": dialogue or "prompt"})
    assert columns.prompt is not None
    value = column(first, columns.prompt)
    form = section.format
    if form == "auto":
        message = value[0] if isinstance(value, list) and value else value
        if isinstance(message, dict):
            form = "sharegpt" if "from" in message else "chat"
        else:
            refuse_written_out(row=first, name=columns.prompt, value=value)
            form = "hh" if isinstance(value, str) and is_transcript(value) else "text"
    return Reading(form, columns, pairs=False, rules=rules_of(section))


def prompt_row(row: RawRow, reading: Reading) -> Row | Refused:
    """One row's prompt in canonical shape, without responses, or the reason it is refused.

    A dialogue that ends with the assistant's turn is a prompt without that turn: what it said is a
    response, and the policy is to give its own.
    """
    if row.flaw is not None:
        return Refused(Reject.BROKEN_TEXT, row.flaw)
    columns = reading.columns
    assert columns.prompt is not None  # `prompt_reading` has seen to it
    value = column(row, columns.prompt)
    if reading.format == "text":
        result = Row(_text(row, columns.prompt, value), (), ())
    else:
        turns = messages(row, reading.format, columns.prompt, value, "user")
        turns = unflagged(turns)
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if columns.system is not None:
            turns = _with_system(row, columns.system, turns)
        result = Row(turns, (), ())
    result = replace(result, options=_options(row, reading))
    return refusal(result, drop_ties=reading.drop_ties) or result


def canonical(row: RawRow, reading: Reading) -> Row | Refused:
    """One row in canonical shape, or the reason it is refused.

    Raises: DataError naming file, row and column where a value is of a kind the format cannot hold.
    """
    if row.flaw is not None:
        return Refused(Reject.BROKEN_TEXT, row.flaw)
    columns = reading.columns
    names = [columns.chosen, columns.rejected] if reading.pairs else [columns.chosen]
    values = [column(row, name) for name in names if name is not None]
    read = _text_row if reading.format == "text" else _chat_row
    result = read(row, reading, values)
    if isinstance(result, Refused):
        return result
    scores = (score(row, columns.score_chosen), score(row, columns.score_rejected))
    if columns.margin is not None:
        margin = score(row, columns.margin)
        if margin is None:
            raise DataError(
                f"{row.where}: column {columns.margin!r} is empty: every pair needs its margin; write 0 where "
                "there is none"
            )
        scores = (margin, 0.0)
    result = replace(result, scores=scores[: len(values)], options=_options(row, reading))
    return refusal(result, drop_ties=reading.drop_ties) or result


def unread_columns(row: RawRow, readings: Sequence[Reading]) -> list[str]:
    """The columns of a row that no reading looks at."""
    read: set[str | None] = set()
    for reading in readings:
        columns, labels = reading.columns, reading.labels
        read |= {columns.prompt, columns.chosen, columns.system, columns.id, columns.margin}
        read |= {columns.score_chosen, columns.score_rejected}
        read |= {columns.rejected} if reading.pairs else set()
        if labels is not None:
            read |= {labels.reward, labels.advantage, labels.ended}
        if reading.format != "text":
            read |= {columns.tools, columns.documents, columns.chat_template_kwargs}
    heads = {name if name in row.data else name.partition(".")[0] for name in read if name}
    return [name for name in row.data if name not in heads]


def rules_of(section: SourceSection) -> RenderOptions:
    """What a source allows of the rendering of its rows."""
    kept = section.control_tokens
    return RenderOptions(
        omits=section.template_omits, control_tokens="all" if "all" in kept else kept
    )


def _options(row: RawRow, reading: Reading) -> RenderOptions:
    """What a row is rendered with beside its messages. Raises: DataError for what cannot be shown to a policy."""
    columns = reading.columns
    seen = {name: value for name, value in row.data.items() if name not in columns.ignored}
    own = {columns.prompt, columns.chosen, columns.rejected}
    refuse_media(row, {k: v for k, v in seen.items() if k not in own}, "the row")
    if reading.format == "text":
        return reading.rules  # no template: nothing could show them
    return template_columns(row, columns, reading.rules)


def require_last_turn(section: SourceSection, why: str) -> None:
    """Raises ConfigError if a source has ``turns: all`` where the last turn alone is read, and ``why``."""
    if section.columns.turns == "all":
        raise ConfigError(f"data: {section.path}: columns.turns = all: {why}")


def _check(section: SourceSection, pairs: bool) -> None:
    columns = section.columns
    where = f"data: {section.path}:"
    if pairs:
        require_last_turn(section, "the sides of a pair are last turns: leave it out")
    if pairs and columns.rejected is None:
        raise ConfigError(
            f"{where} columns.rejected = null: preference pairs need both sides; name the column, "
            "or set stage: sft to train on chosen alone"
        )
    if section.drop_ties and (columns.score_chosen is None or columns.score_rejected is None):
        raise ConfigError(
            f"{where} drop_ties = true: needs columns.score_chosen and columns.score_rejected"
        )
    if section.drop_ties and not pairs:
        raise ConfigError(f"{where} drop_ties = true: has no meaning for SFT rows; leave it out")


def _present(columns: ColumnMap, first: RawRow, pairs: bool) -> ColumnMap:
    """Columns with defaults that are absent replaced by what the first row has instead."""
    dialogue = next((name for name in _DIALOGUE_COLUMNS if has_column(first.data, name)), None)
    changes: dict[str, str | None] = {}
    no_prompt = columns.prompt == "prompt" and not has_column(first.data, "prompt")
    no_chosen = columns.chosen == "chosen" and not has_column(first.data, "chosen")
    if not pairs and no_chosen and dialogue and (no_prompt or columns.prompt is None):
        return columns.model_copy(update={"chosen": dialogue, "prompt": None})
    if no_prompt:
        taken = (columns.chosen, columns.rejected)
        changes["prompt"] = dialogue if dialogue not in taken else None
    return columns.model_copy(update=changes)


def _detect(columns: ColumnMap, first: RawRow) -> str:
    chosen = column(first, columns.chosen)
    prompt = None if columns.prompt is None else column(first, columns.prompt)
    for value in (prompt, chosen):
        message = value[0] if isinstance(value, list) and value else value
        if isinstance(message, dict):
            return "sharegpt" if "from" in message else "chat"
    if isinstance(prompt, list) or isinstance(chosen, list):
        return "chat"
    if columns.prompt is None and isinstance(chosen, str) and is_transcript(chosen):
        return "hh"
    return "text"


def _text_row(row: RawRow, reading: Reading, values: list[Any]) -> Row:
    columns = reading.columns
    assert columns.prompt is not None  # `resolve` has seen to it
    names = (columns.prompt, columns.chosen, columns.rejected)
    texts = [
        _text(row, str(name), value)
        for name, value in zip(names, [column(row, columns.prompt), *values], strict=False)
    ]
    return Row(texts[0], tuple(texts[1:]), ())


def _text(row: RawRow, name: str, value: Any) -> str:
    if value is None:
        return ""  # a null is an empty side, which is counted, not a broken file
    if isinstance(value, str):
        return value
    raise DataError(
        f"{row.where}: column {name!r} holds {kind_of(value)}, but the format is text (plain strings); "
        "set format: chat (or sharegpt) on the source"
    )


def _chat_row(row: RawRow, reading: Reading, values: list[Any]) -> Row | Refused:
    """Messages: prompt = what comes before the last turn, the same on both sides."""
    columns = reading.columns
    context = None
    if columns.prompt is not None:
        turn = messages(row, reading.format, columns.prompt, column(row, columns.prompt), "user")
        context = turn[:-1] if reading.format == "hh" and _awaits_answer(turn) else turn
    names = (columns.chosen, columns.rejected)
    dialogues = [
        messages(row, reading.format, str(name), value, "assistant")
        for name, value in zip(names, values, strict=False)
    ]
    for dialogue, reason in zip(
        dialogues, (Reject.EMPTY_CHOSEN, Reject.EMPTY_REJECTED), strict=False
    ):
        if not dialogue:
            return Refused(reason)
        if dialogue[-1]["role"] != "assistant":
            return Refused(Reject.NOT_ASSISTANT, f"the last turn is {dialogue[-1]['role']!r}")
    if context and context[-1]["role"] == "assistant" == dialogues[0][0]["role"]:
        return Refused(Reject.PROMPT_ANSWERED)
    prompts = [_prompt_of(context, dialogue) for dialogue in dialogues]
    prompt = prompts[0]
    if prompt is None or any(other != prompt for other in prompts):
        return Refused(Reject.PROMPTS_DIFFER)
    if columns.system is not None:
        prompt = _with_system(row, columns.system, prompt)
    name = str(columns.chosen if columns.prompt is None else columns.prompt)
    flags = [flagged(row, name, prompt)]
    flags += [flagged(row, name, dialogue[-1:]) for dialogue in dialogues]
    found = Row(unflagged(prompt), tuple(unflagged([d[-1]])[0] for d in dialogues), ())
    if reading.pairs or reading.labels is not None:
        _refuse_flags(row, flags)
        return found
    return _with_loss(row, found, flags[0], flags[1][0], columns.turns)


def _with_loss(
    row: RawRow, found: Row, earlier: list[bool | None], last: bool | None, turns: str
) -> Row:
    """``found`` with the turns that carry loss: as each says itself, else as the source has it."""
    assert not isinstance(found.prompt, str)  # `_chat_row` reads dialogues
    answered = answered_turns(found.prompt)
    opening = next((n for n, flag in enumerate(earlier) if flag and n not in answered), None)
    if opening is not None:
        raise DataError(
            f"{row.where}: message {opening + 1} is to carry loss, and nothing comes before it to answer: leave "
            "its flag out"
        )
    with_loss = [n for n in answered if earlier[n] or (earlier[n] is None and turns == "all")]
    return replace(found, earlier=tuple(with_loss), trained=last is not False)


def _refuse_flags(row: RawRow, flags: list[list[bool | None]]) -> None:
    """Of a pair or a sample the last turns carry loss, and they alone: a flag may say so, and nothing else."""
    prompt, *sides = flags
    if True in prompt or any(False in side for side in sides):
        raise DataError(
            f"{row.where}: a message says that it carries loss, or none (weight, train), and the loss here is "
            "of the last turns alone: leave the flag out, or train on dialogues with stage: sft"
        )


def _prompt_of(context: list[Message] | None, dialogue: list[Message]) -> list[Message] | None:
    """Messages the last turn of ``dialogue`` answers; None if they contradict the prompt column.

    ``dialogue`` may be the answer alone, the whole dialogue with the prompt repeated at its start
    (UltraFeedback), or a continuation of the prompt over several turns.
    """
    before = dialogue[:-1]
    if context is None or not before:
        return before if context is None else context
    if dialogue[0]["role"] == "assistant":
        return context + before
    # Published sets differ in white space between the prompt column and its copy in the dialogue,
    # and some leave the system message out of the column.
    skip = before[0]["role"] == "system" and (not context or context[0]["role"] != "system")
    start = before[skip : skip + len(context)]
    same = [_gist(m) for m in start] == [_gist(m) for m in context]
    return before if same else None


def _gist(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _awaits_answer(turns: list[Message]) -> bool:
    """Whether a transcript ends with the bare "Assistant:" that asks for the answer."""
    return bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1]["content"]


def _with_system(row: RawRow, name: str, prompt: list[Message]) -> list[Message]:
    content = _text(row, name, column(row, name))
    if not content.strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        raise DataError(
            f"{row.where}: column {name!r} gives a system message, and the dialogue begins with one too; "
            "leave out columns.system"
        )
    return [{"role": "system", "content": content}, *prompt]
