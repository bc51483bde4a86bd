"""A row an instruction: from an annotation of alpaca_eval's, or from our own judge."""

from __future__ import annotations

import math
from typing import Any

from eval.base import Row
from eval.sources import columns, require, text_key
from eval.tasks._alpaca_judge import model_first, model_win, published_logprobs
from prefopt.data.readers import RawRow
from prefopt.errors import DataError

BASELINE = "gpt4_1106_preview"
"""As alpaca_eval's files call it."""

_MISSING = -1
"""What alpaca_eval's cache of annotations stores for a judgment that failed."""


def make_row(
    key: str,
    win: float | None,
    outputs: tuple[str, str],
    *,
    problem: str | None,
    baseline: str | None,
    dataset: Any,
    against_itself: bool = False,
) -> Row:
    """The result of one instruction.

    Args:
        key: `eval.sources.text_key` of the instruction.
        win: probability that the model's answer is preferred; None if there is no preference.
        outputs: the baseline's answer and the model's.
        baseline: whose the first is; None if it is not the published one.
        against_itself: the model is the baseline.
    """
    theirs, ours = outputs
    details = {
        "length": len(ours),
        "baseline_length": len(theirs),
        "baseline": baseline,
        "dataset": dataset,
        "against_itself": against_itself or theirs == ours,
    }
    kept = {
        name: value for name, value in details.items() if value is not None and value is not False
    }
    return Row(key, {"win_rate": win}, kept, problem)


def annotation_row(raw: RawRow) -> Row:
    """Raises: DataError for a row without instruction or outputs, or a preference that is none."""
    instruction = str(require(raw, "instruction"))
    win, problem = _preference(raw, instruction)
    for name in ("output_1", "output_2"):
        if name not in raw.data:
            raise DataError(f"{raw.where}: no column {name!r}; its columns: {columns(raw)}")
        if raw.data[name] is None:
            problem = problem or "null_response"
    theirs, ours = (str(raw.data[name] or "") for name in ("output_1", "output_2"))
    baseline = raw.data.get("generator_1")
    return make_row(
        text_key(instruction),
        win,
        (theirs, ours),
        problem=problem,
        baseline=str(baseline or BASELINE),
        dataset=raw.data.get("dataset"),
        against_itself=baseline is not None and baseline == raw.data.get("generator_2"),
    )


def _preference(raw: RawRow, instruction: str) -> tuple[float | None, str | None]:
    """The model's win in [0, 1], or None and why."""
    if "preference" not in raw.data:
        return _recomputed(raw, instruction)
    given = raw.data["preference"]
    if given in (None, ""):
        return None, "null_preference"
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.inf
    if math.isnan(value) or value == _MISSING:
        return None, "null_preference"
    if value == 0:  # an earlier way to write a draw
        return 0.5, None
    if not 1 <= value <= 2:
        raise DataError(
            f"{raw.where}: preference = {given!r}: must be in [1, 2] (2: the model's answer is preferred), 0 for "
            "a draw, or null"
        )
    return value - 1, None


def _recomputed(raw: RawRow, instruction: str) -> tuple[float | None, str | None]:
    if "raw_completion" not in raw.data:
        raise DataError(
            f"{raw.where}: neither 'preference' nor 'raw_completion' with the judge's log-probs; its columns: "
            f"{columns(raw)}"
        )
    if raw.data.get("output_1") == raw.data.get("output_2"):
        return 0.5, None
    top = published_logprobs(raw.data["raw_completion"])
    if top is None:
        return None, "no_logprobs"
    win = model_win(top, first=model_first(instruction))
    return win, None if win is not None else "no_verdict"
