"""The numbers of AlpacaEval 2 from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.base import Metric, Row, Summary
from eval.statistics import group_means, mean_metric, problem_counts, values_of
from eval.tasks._alpaca_instructions import NUM_INSTRUCTIONS, instruction_number
from eval.tasks._alpaca_rows import BASELINE
from eval.tasks._lc_winrate import Calibration, length_controlled
from prefopt.errors import DataError

_NONE = Metric(float("nan"))


def alpaca_summary(rows: Sequence[Row], calibration: Callable[[], Calibration]) -> Summary:
    """Win rates in percent and counts; ``calibration`` is only called where it is needed.

    Raises: DataError if no row has a preference.
    """
    wins = np.array(values_of(rows, "win_rate"))
    if not len(wins):
        problems = ", ".join(f"{name} {count}" for name, count in problem_counts(rows).items())
        raise DataError(
            f"alpaca_eval2: none of the {len(rows)} rows has a preference ({problems or 'no rows'}). A judge must "
            "return log-probs of its first token (logprobs, top_logprobs), and answer with m or M"
        )
    controlled, notes = _length_controlled(rows, calibration)
    raw = mean_metric(wins.tolist(), 100)
    metrics = {
        "length_controlled_winrate": controlled,
        "win_rate": raw,
        # The names that the benchmark publishes them by.
        "lc_standard_error": _stderr(controlled),
        "standard_error": _stderr(raw),
        "discrete_win_rate": mean_metric(np.where(wins == 0.5, 0.5, wins > 0.5).tolist(), 100),
        # Whole characters, rounded down, as published.
        "avg_length": Metric(float(sum(row.details["length"] for row in rows) // len(rows))),
    }
    groups = group_means(rows, "dataset", "win_rate", 100)
    return Summary(metrics, _counts(rows, wins), groups, (*notes, *_notes(rows, raw, controlled)))


def _counts(rows: Sequence[Row], wins: np.ndarray) -> dict[str, int]:
    return {
        "n_wins": int((wins > 0.5).sum()),
        "n_wins_base": int((wins < 0.5).sum()),
        "n_draws": int((wins == 0.5).sum()),
        "n_total": len(wins),
        "n_without_preference": len(rows) - len(wins),
        "n_instructions_missing": NUM_INSTRUCTIONS - len(_known(rows)),
        **problem_counts(rows),
    }


def _known(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if instruction_number(row.key) is not None]


def _length_controlled(
    rows: Sequence[Row], calibration: Callable[[], Calibration]
) -> tuple[Metric, list[str]]:
    """The metric and where its calibration comes from, or why there is none."""
    if all(row.details.get("against_itself") for row in rows):
        return Metric(50.0, 0.0), ["a model against itself: 50 by definition, nothing was fitted"]
    # In the benchmark's order, so that cross-validation cuts the same folds however a file is sorted.
    known = sorted(_known(rows), key=lambda row: instruction_number(row.key) or 0)
    if not known:
        return _NONE, ["no length-controlled win rate: no instruction is one of AlpacaEval's 805"]
    lengths = _column(known, lambda row: row.details["baseline_length"] - row.details["length"])
    wins = _column(known, lambda row: row.values["win_rate"])
    if np.isnan(wins).all() or len(np.unique(lengths)) < 2:
        return _NONE, ["no length-controlled win rate: needs two answers of different length"]
    numbers = np.array([instruction_number(row.key) for row in known])
    found = calibration()
    predicted = length_controlled(wins, lengths, numbers, found)
    return mean_metric(predicted.tolist(), 100), [f"length control: calibration {found.origin}"]


def _column(rows: Sequence[Row], value: Callable[[Row], Any]) -> np.ndarray:
    """fp64; a None is NaN."""
    return np.array([value(row) for row in rows], dtype=np.float64)


def _stderr(metric: Metric) -> Metric:
    return _NONE if metric.stderr is None else Metric(metric.stderr)


def _notes(rows: Sequence[Row], raw: Metric, controlled: Metric) -> list[str]:
    notes = []
    known = len(_known(rows))
    if known < NUM_INSTRUCTIONS:
        notes.append(
            f"{NUM_INSTRUCTIONS - known} of AlpacaEval's {NUM_INSTRUCTIONS} instructions have no row. "
            "Difficulties were matched by instruction; alpaca_eval itself matches by position, which is off from "
            "the first missing row on"
        )
    if known < len(rows):
        notes.append(
            f"{len(rows) - known} rows are of other instructions: in win_rate, not in the length-controlled one"
        )
    without = sum(row.problem == "no_logprobs" for row in rows)
    if without:
        notes.append(
            f"{without} judgments came without log-probs and have no preference: the judge's endpoint must honour "
            "logprobs and top_logprobs"
        )
    others = sorted({str(row.details.get("baseline", "another one")) for row in rows} - {BASELINE})
    if others:
        notes.append(
            f"the calibration is for the baseline {BASELINE}; here it is {', '.join(others)}: the "
            "length-controlled win rate is not comparable"
        )
    if _is_extreme(raw.value, controlled.value):
        notes.append(
            f"the length-controlled win rate is far from the raw one ({controlled.value:.1f} vs {raw.value:.1f}): "
            "the regression may have failed"
        )
    return notes


def _is_extreme(raw: float, controlled: float) -> bool:
    """As published: off by more than 10 points and more than a quarter of the way to 0 or 100; False for NaN."""
    below = raw - max(10.0, raw / 4)
    above = raw + max(10.0, (100 - raw) / 4)
    return controlled < below or controlled > above
