"""LLMBar's ``result.json``: the winners that its evaluators read in their own completions, or in two ratings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eval.base import Row
from prefopt.data.readers import RawRow
from prefopt.data.rows import shown
from prefopt.errors import DataError
from prefopt.signals.verdicts import Verdict, parse_verdict

ORDERS = ("original", "swapped")
PICKS: dict[str, dict[Verdict | None, int | None]] = {
    "original": {"A": 1, "B": 2, "C": None, None: None},
    "swapped": {"A": 2, "B": 1, "C": None, None: None},
}
"""Which of the file's two outputs a letter means; a tie is neither."""
_RULES = (
    (re.compile(r"(?:^|\n) ?Output \(a\)"), re.compile(r"(?:^|\n) ?Output \(b\)")),
    (re.compile(r"Output \(a\) is better."), re.compile(r"Output \(b\) is better.")),
)
"""LLMBar's, of evaluators without and with reasoning; the first of a pair that is found anywhere counts."""
_ENTRIES: dict[str, str] = dict(zip(ORDERS, ("swap = False", "swap = True"), strict=True))


def result_rows(raw: RawRow, key: str, label: int) -> list[Row]:
    """Both orders of one pair, by its stored winners: the last of ``results``, after whatever it was made from.

    A winner that is null is an answer in which LLMBar read none. Where the completion says another one than is
    stored, ``details["read"]`` has it.
    Raises: DataError naming file, line and what is missing.
    """
    results = raw.data["results"]
    if not isinstance(results, list) or not results:
        raise DataError(
            f"{raw.where}: results = {shown(results)}: must be a list, and its last item the verdicts"
        )
    return [_row(raw, results[-1], key, label, order) for order in ORDERS]


def verdict_row(
    pair: str, order: str, label: int, verdict: Verdict | None, problem: str | None = None
) -> Row:
    """One order of one pair: right if the output that ``verdict`` means is the better one."""
    details = {"pair": pair, "order": order, "verdict": verdict}
    right = float(PICKS[order][verdict] == label)
    missing = "no_verdict" if verdict is None else None
    return Row(f"{pair}/{order}", {"accuracy": right}, details, problem or missing)


def winner_letter(winner: Any, order: str, where: str) -> Verdict | None:
    """A stored winner (1, 2 or null, of the file's outputs) as the letter its judge said.

    Raises: DataError for anything else.
    """
    if winner is None:
        return None
    letters: dict[str, Verdict] = {
        str(pick): letter for letter, pick in PICKS[order].items() if pick and letter
    }
    if str(winner) not in letters:
        raise DataError(
            f"{where} = {shown(winner)}: must be 1, 2 or null, as LLMBar stores winners"
        )
    return letters[str(winner)]


def published_readings(text: str) -> set[Verdict | None]:
    """What LLMBar's own two rules read in a completion: which of them an evaluator has, no file says."""
    letters: tuple[Verdict, ...] = ("A", "B")
    return {
        next(
            (letter for letter, each in zip(letters, rule, strict=True) if each.search(text)), None
        )
        for rule in _RULES
    }


def _row(raw: RawRow, result: Any, key: str, label: int, order: str) -> Row:
    name = _ENTRIES[order]
    entry = result.get(name) if isinstance(result, Mapping) else None
    if not isinstance(entry, Mapping) or "winner" not in entry:
        raise DataError(
            f"{raw.where}: results[-1] has no {name!r} with a winner: each pair is judged in both orders"
        )
    winner = winner_letter(entry["winner"], order, f"{raw.where}: results[-1][{name!r}].winner")
    row = verdict_row(key, order, label, winner)
    text = _text(entry.get("completion"))
    read = winner if text is None else parse_verdict(text)
    return row if read == winner else replace(row, details={**row.details, "read": read})


def _text(completion: Any) -> str | None:
    """The judge's words: text, or ``[text, finish reason]``; None where an evaluator kept none."""
    first = completion[0] if isinstance(completion, list) and completion else completion
    return first if isinstance(first, str) else None
