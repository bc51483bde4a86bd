"""``prefopt show``: the first examples or prompts as the model sees them, and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from prefopt.data import DataBundle, PromptSet
from prefopt.model.load import load_tokenizer
from prefopt.recipe.schema import Recipe
from prefopt.recipe.scored_rows import columns_read
from prefopt.report.terminal import Terminal
from prefopt.rollouts.setup import load_run_data
from prefopt.shown import visible
from prefopt.signals.base import column
from prefopt.types import Group, Prompt, Response, TokenIds

HEAD_TOKENS, TAIL_TOKENS = 200, 60
"""Tokens shown of the beginning and of the end of a longer part."""

FIELD_CHARS = 300
"""Characters shown of a column that signals read."""

STYLES = {
    "prompt": "dim",
    "context": "dim",
    "chosen": "green",
    "rejected": "red",
    "response": "green",
}
SEPARATOR = "│"


def show(recipe: Recipe, n: int = 2, *, color: bool = True) -> None:
    """Prints the first ``n`` training examples or prompts of a recipe as tokens, and its rejects by reason.

    Each part says its role, its length in tokens and whether it carries loss; ``│`` stands between
    tokens and ``⏎`` for a line break inside one. Prompts for rollouts are shown with the columns that
    the signals read. No model is loaded; what is tokenised here is cached and found again by the run.

    Args:
        recipe: a checked recipe.
        n: examples to print.
        color: colour the roles where the terminal can; plain text otherwise.

    Raises: DataError, ModelError as `load_run_data` and `load_tokenizer` do.
    """
    console = Terminal(no_color=not color, soft_wrap=True)
    tokenizer = load_tokenizer(recipe.model)
    data = load_run_data(recipe, tokenizer)
    if data.prompts is not None:
        for prompt in data.prompts.prompts[:n]:
            fields = columns_read(recipe.signals, prompt.fields, prompt.source)
            _print_prompt(console, prompt, fields, tokenizer)
    if data.train is not None:
        for index in range(min(n, len(data.train))):
            _print_group(console, data.train.group(index), tokenizer)
    _print_summary(console, data)


def _print_prompt(console: Console, prompt: Prompt, fields: Sequence[str], tokenizer: Any) -> None:
    """A prompt as the policy continues it, the data's own response, and what signals check against."""
    own = prompt.offline_ids
    length = f" · own response {len(own)}" if own is not None else ""
    console.print(Text(f"── {prompt.id} ── prompt {len(prompt.ids)}{length}", "bold"))
    console.print(
        Text(f"prompt ({len(prompt.ids)} tokens, the policy goes on from here)", "bold dim")
    )
    console.print(token_text(tokenizer, prompt.ids, STYLES["prompt"]))
    if own is not None:
        title = f"own response ({len(own)} tokens, from the data)"
        console.print(Text(title, f"bold {STYLES['response']}"))
        console.print(token_text(tokenizer, own, STYLES["response"]))
    for name in fields:
        console.print(Text(f"{name}: {_short(column(prompt, name))}", "cyan"))
    console.print(Text(_bos(tokenizer, prompt.ids), "italic"))
    console.print()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return visible(text if len(text) <= FIELD_CHARS else f"{text[:FIELD_CHARS]} …")


def _print_group(console: Console, group: Group, tokenizer: Any) -> None:
    parts = " · ".join(f"{role} {len(ids)}" for role, ids in _parts(group))
    console.print(Text(f"── {group.id} ── {parts} · {group.num_tokens} tokens in all", "bold"))
    for role, ids in _parts(group):
        loss = "no loss" if role in _WITHOUT_LOSS else "loss on every token"
        console.print(Text(f"{role} ({len(ids)} tokens, {loss})", f"bold {STYLES[role]}"))
        console.print(token_text(tokenizer, ids, STYLES[role]))
    console.print(Text(_ends(tokenizer, group), "italic"))
    console.print()


def token_text(tokenizer: Any, ids: TokenIds, style: str = "") -> Text:
    """The tokens as text with ``│`` between them; special tokens bold, the middle of long parts left out."""
    special = set(tokenizer.all_special_ids)
    text = Text()
    hidden = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    for place, token in enumerate(ids):
        if hidden > 0 and HEAD_TOKENS <= place < HEAD_TOKENS + hidden:
            if place == HEAD_TOKENS:
                text.append(f"\n… {hidden} more tokens …\n", "italic")
            continue
        if place:
            text.append(SEPARATOR, "dim")
        text.append(_piece(tokenizer, token), f"bold {style}" if token in special else style)
    return text


def _piece(tokenizer: Any, token: int) -> str:
    """One token as text: its leading space kept, line breaks visible, half a character as its raw piece."""
    raw = tokenizer.convert_ids_to_tokens(int(token))
    text = tokenizer.decode([int(token)], skip_special_tokens=False)
    if "\ufffd" in text:
        return visible(str(raw))
    # SentencePiece decodes a lone "▁word" without the space that it stands for.
    if str(raw).startswith(("▁", "Ġ")) and not text.startswith(" "):
        text = f" {text}"
    return visible(text).replace("\n", "⏎\n")


_WITHOUT_LOSS = ("prompt", "context")


def _parts(group: Group) -> list[tuple[str, TokenIds]]:
    """Role and ids of each part of a group, the prompt first; between turns with loss lies context."""
    roles = {}
    for chosen, rejected in group.pairs:
        roles |= {chosen: "chosen", rejected: "rejected"}
    parts: list[tuple[str, TokenIds]] = [("prompt", group.prompt_ids)]
    for index, response in enumerate(group.responses):
        counts = np.isin(np.arange(len(response.ids)), response.loss_places)
        starts = np.flatnonzero(np.diff(counts)) + 1
        for ids, run in zip(np.split(response.ids, starts), np.split(counts, starts), strict=True):
            parts.append((roles.get(index, "response") if run[0] else "context", ids))
    return parts


def _ends(tokenizer: Any, group: Group) -> str:
    """How the sequence starts and ends: what goes wrong most often with chat templates."""
    ends = ", ".join(
        f"{role} ends with {_piece(tokenizer, ids[-1])!r}"
        for role, ids in _parts(group)
        if role not in _WITHOUT_LOSS
    )
    return f"{_bos(tokenizer, group.prompt_ids)}; {ends}{_scores(group.responses)}"


def _bos(tokenizer: Any, prompt_ids: TokenIds) -> str:
    if tokenizer.bos_token_id is None:
        return "no BOS"
    count = list(prompt_ids).count(tokenizer.bos_token_id)
    return f"BOS {tokenizer.bos_token!r} {count} time(s) in the prompt"


def _scores(responses: Sequence[Response]) -> str:
    labels = {
        "scores": [response.score for response in responses],
        "advantages": [response.advantage for response in responses],
    }
    return "".join(
        f"; {name} {', '.join(f'{value:g}' for value in values if value is not None)}"
        for name, values in labels.items()
        if any(value is not None for value in values)
    )


def _print_summary(console: Console, data: DataBundle) -> None:
    held_out = f"{len(data.eval) if data.eval is not None else 0} held out"
    if data.prompts is not None:
        console.print(f"{_prompts_line(data.prompts)}, {held_out}")
    if data.train is not None:
        lengths = data.train.num_tokens
        console.print(
            f"{len(data.train)} rows to train on ({int(lengths.sum())} tokens, longest "
            f"{int(lengths.max())}), {held_out}"
        )
    counts = data.reject_counts
    console.print(f"{sum(counts.values())} rejected")
    first = _first_of_each_reason(data)
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        console.print(f"  {count} {reason}, first: {first[reason]}")


def _prompts_line(prompts: PromptSet) -> str:
    lengths = [len(prompt.ids) for prompt in prompts.prompts]
    own = sum(prompt.offline_ids is not None for prompt in prompts.prompts)
    return (
        f"{len(prompts)} prompts to sample from ({sum(lengths)} tokens, longest {max(lengths)}), "
        f"{own} with a response of their own"
    )


def _first_of_each_reason(data: DataBundle) -> dict[str, str]:
    """Where the first row of every reject reason stands, with its detail or lengths."""
    first: dict[str, str] = {}
    of_prompts = data.prompts.rejects if data.prompts is not None else ()
    for lines in (of_prompts, *(store.rejects() for _, store in data.sources)):
        for line in lines:
            where = f"{Path(str(line['file'])).name} row {line['row']}"
            found = line.get("detail") or line.get("lengths")
            first.setdefault(line["reason"], f"{where} ({found})" if found else where)
    return first
