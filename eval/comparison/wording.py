"""How a comparison's numbers and caveats read: the same words in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from eval.base import Metric
from eval.comparison.outputs import TaskResult
from eval.comparison.paired import LEVEL
from eval.comparison.tree import Comparison, Pair, TaskComparison, oriented

FORCED = "FORCED: these results are not of the same measurement; what differs:"

PERCENT = f"{100 * LEVEL:.0f} %"
"""The level of every interval here."""
ALPHA = f"{1 - LEVEL:.2g}"
"""The level of every test here."""

_USUAL = {"num_answers", "num_tokens"}

TESTS = {
    "mcnemar": "McNemar's exact test (0/1 values)",
    "sign_flip": "a sign-flip permutation test (random signs)",
    "sign_flip_exact": "a sign-flip permutation test (all signs)",
}


def number(value: float, *, signed: bool = False, decimals: int | None = None) -> str:
    """Two decimals, or three digits of what is smaller than 1; an en dash for no number."""
    if not math.isfinite(value):
        return "–"
    places = _decimals(value) if decimals is None else decimals
    text = f"{value:{'+' if signed else ''}.{places}f}".replace("-", "−")
    return text.lstrip("+−") if not float(f"{value:.{places}f}") else text


def spread_text(value: float, bounds: tuple[float, float] | None, *, signed: bool = False) -> str:
    """``1.20 (0.95…1.45)``, all with the decimals of the largest; the value alone without bounds."""
    if bounds is None:
        return number(value, signed=signed)
    places = _decimals(value, *bounds)
    texts = [number(each, signed=signed, decimals=places) for each in (value, *bounds)]
    return f"{texts[0]} ({texts[1]}…{texts[2]})"


def metric_text(metric: Metric) -> str:
    """``57.30 ± 1.20``, or with the benchmark's own interval ``57.30 (55.10…59.20)``."""
    if metric.interval is not None or metric.stderr is None:
        return spread_text(metric.value, metric.interval)
    places = _decimals(metric.value, metric.stderr)
    return f"{number(metric.value, decimals=places)} ± {number(metric.stderr, decimals=places)}"


def _decimals(*values: float) -> int:
    """2, or as many as show three digits of the largest where that is smaller than 1 (six at most)."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0 or largest >= 1:
        return 2
    return min(6, 2 - math.floor(math.log10(largest)))


def p_text(p_value: float | None) -> str:
    """Three decimals, four where they matter."""
    if p_value is None:
        return "–"
    if p_value < 0.0001:
        return "< 0.0001"
    return f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.3f}"


def metric_names(task: TaskComparison) -> list[str]:
    """Of all results, in their order."""
    return list(dict.fromkeys(name for each in task.results.values() for name in each.metrics))


def metric_cell(task: TaskComparison, result: str, metric: str) -> str:
    """One number of a table; an en dash where a result has none."""
    found = task.results[result].metrics.get(metric) if result in task.results else None
    return "–" if found is None else metric_text(found)


def pair_cells(task: TaskComparison, pair: Pair) -> list[str]:
    """Difference, number of examples, p, Holm's p, won, lost and tied."""
    difference = pair.difference
    if difference is None:
        return ["–", "0", *["–"] * 5]
    return [
        spread_text(difference.mean, difference.interval, signed=True),
        f"{difference.n:,}",
        p_text(difference.p_value),
        p_text(pair.p_holm),
        *(f"{count:,}" for count in oriented(difference, task.direction)),
    ]


def tests_text(task: TaskComparison) -> str:
    """What the p-values of a task's pairs come from; empty if there are none."""
    return " and ".join(sorted({TESTS[p.difference.test] for p in task.pairs if p.difference}))


def comparison_remarks(comparison: Comparison) -> list[str]:
    """What differs beside the tasks' settings, and what was left out."""
    alone = comparison.alone.items()
    lines = [f"{task}: only {name} has it; not compared" for task, name in alone]
    return [*comparison.remarks, *lines]


def task_remarks(task: TaskComparison) -> list[str]:
    """What a reader must know to read a task's numbers and differences."""
    lines = []
    if not task.of_rows and any(pair.difference for pair in task.pairs):
        lines.append(
            f"the headline {task.headline} is no plain mean over examples; the paired difference is of each "
            f"example's {task.value_name}, and need not equal the difference of the headlines"
        )
    if task.without:
        lines.append(f"not evaluated in {', '.join(task.without)}")
    for name, result in task.results.items():
        dropped = dropped_text(result.counts)
        lines += [f"{name}: {dropped}"] if dropped else []
    lines += _notes(task.results)
    return lines + [line for pair in task.pairs for line in _pair_remarks(pair)]


def _pair_remarks(pair: Pair) -> list[str]:
    """What was not paired, and how much of it."""
    names = f"{pair.second} − {pair.first}"
    lines = [f"{names}: {pair.unpaired}"] if pair.unpaired else []
    for count, what in (
        (pair.num_only_first, f"only {pair.first} has"),
        (pair.num_only_second, f"only {pair.second} has"),
        (pair.num_without_value, "without a value on one side or both"),
    ):
        if count:
            lines.append(f"{names}: {count:,} example{'s' if count > 1 else ''} {what}, left out")
    return lines


def _notes(results: Mapping[str, TaskResult]) -> list[str]:
    """Each note once, with the results it is of unless it is of all."""
    whose: dict[str, list[str]] = {}
    for name, result in results.items():
        for note in dict.fromkeys(result.notes):
            whose.setdefault(note, []).append(name)
    return [
        note if len(names) == len(results) else f"{', '.join(names)}: {note}"
        for note, names in whose.items()
    ]


def dropped_text(counts: Mapping[str, int]) -> str:
    """Counts of what is missing or went wrong, in words; empty if nothing did."""
    return ", ".join(
        f"{count:,} {name.removeprefix('num_').replace('_', ' ')}"
        for name, count in counts.items()
        if name.startswith("num_") and count and name not in _USUAL
    )
