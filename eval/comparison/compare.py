"""``prefopt eval compare A B …``: every later result against the first, example by example, paired by key."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.comparison.comparability import Mismatch, head_remarks, mismatches, refuse, remarks
from eval.comparison.frontier import frontier
from eval.comparison.outputs import ExampleFile, Output, open_examples, open_outputs
from eval.comparison.paired import RESAMPLES, holm, paired_difference
from eval.comparison.table import print_comparison
from eval.comparison.tree import Comparison, Contrast, Pair, TaskComparison, comparison_json
from prefopt.errors import ConfigError

__all__ = ["Comparison", "compare", "comparison_json", "print_comparison"]

_SHOWN = 5


@dataclass(frozen=True)
class _How:
    """What `compare` was asked for."""

    seed: int
    resamples: int
    shown: int


def compare(
    paths: Sequence[Path],
    *,
    force: bool,
    seed: int = 0,
    reward: str | None = None,
    resamples: int = RESAMPLES,
    shown: int = _SHOWN,
) -> Comparison:
    """The comparison of the evaluations at ``paths``: every task that at least two of them have.

    Args:
        paths: output directories of ``prefopt eval`` (or their ``results.json``), or directories of such
            directories, which stand for all in them by step.
        force: go on although versions, examples, decoding, judge, baseline or options differ; the comparison
            then says so wherever it is shown.
        seed: of bootstrap and permutation tests.
        reward: ``TASK.METRIC`` for the frontier's reward axis; see `eval.comparison.frontier.frontier`.
        resamples: of the bootstrap, and random sign patterns of a permutation test.
        shown: examples to keep with their texts, each way, a pair.

    Raises: ConfigError for results that may not be compared, naming every difference; DataError for files
        that are missing or broken.
    """
    outputs, left_out = open_outputs(paths)
    having = _by_task(outputs)
    shared = {task: those for task, those in having.items() if len(those) > 1}
    differing = {task: mismatches(task, those) for task, those in shared.items()}
    if not force:
        refuse([mismatch for found in differing.values() for mismatch in found])
    front = frontier(outputs, reward)
    how = _How(seed, resamples, shown)
    tasks = [
        _compare_task(task, those, [o for o in outputs if o not in those], differing[task], how)
        for task, those in shared.items()
    ]
    said = [*head_remarks(outputs), *(r for task, o in shared.items() for r in remarks(task, o))]
    return Comparison(
        outputs=tuple(outputs),
        tasks=tuple(_corrected(tasks)),
        frontier=front,
        remarks=(*map(str, said), *left_out),
        alone={task: those[0].name for task, those in having.items() if len(those) == 1},
        seed=seed,
        resamples=resamples,
    )


def _by_task(outputs: Sequence[Output]) -> dict[str, list[Output]]:
    """Who has which task. Raises: ConfigError if no two have one in common."""
    having: dict[str, list[Output]] = {}
    for output in outputs:
        for task in output.tasks:
            having.setdefault(task, []).append(output)
    if all(len(those) < 2 for those in having.values()):
        listed = "; ".join(f"{each.name}: {', '.join(each.tasks) or 'none'}" for each in outputs)
        raise ConfigError(f"no two of the results have a task in common. Their tasks: {listed}")
    return having


def _corrected(tasks: Sequence[TaskComparison]) -> list[TaskComparison]:
    """The tasks with every p-value corrected for all of them."""
    p_values = [pair.difference.p_value for task in tasks for pair in task.pairs if pair.difference]
    corrected = iter(holm(p_values))
    return [
        replace(
            task,
            pairs=tuple(
                replace(pair, p_holm=next(corrected)) if pair.difference else pair
                for pair in task.pairs
            ),
        )
        for task in tasks
    ]


def _compare_task(
    task: str,
    outputs: Sequence[Output],
    without: Sequence[Output],
    differing: Sequence[Mismatch],
    how: _How,
) -> TaskComparison:
    """Every later of ``outputs`` against the first.

    Args:
        outputs: at least two, all with the task.
        without: results that lack it.
        differing: what `eval.comparison.comparability.mismatches` found and the user forced.

    Raises: DataError from `eval.comparison.outputs.open_examples`.
    """
    files = {output.name: open_examples(output, task) for output in outputs}
    results = {output.name: output.tasks[task] for output in outputs}
    first, *others = outputs
    base = results[first.name]
    headlines = {name: result.metrics[result.headline].value for name, result in results.items()}
    scale, of_rows = _scale(files, headlines)
    pairs = tuple(
        _pair(
            (first.name, other.name),
            files[first.name],
            files[other.name],
            scale,
            base.direction,
            how,
        )
        for other in others
    )
    value_name = files[first.name].value_name
    return TaskComparison(
        name=task,
        results=results,
        value_name=value_name,
        unit="percentage points" if scale == 100 else f"units of {value_name or base.headline}",
        of_rows=of_rows,
        pairs=pairs,
        mismatches=tuple(differing),
        without=tuple(output.name for output in without),
    )


def _scale(files: Mapping[str, ExampleFile], headlines: Mapping[str, float]) -> tuple[float, bool]:
    """From the rows' unit to the headline's (1, or 100 for percent), and whether its value is their mean.

    Found from the numbers: a file of rows does not say how its task adds them up.
    """
    means: list[tuple[float, float]] = []
    shares = True
    for name, file in files.items():
        values = [value for value in file.values.values() if value is not None]
        if values and not math.isnan(headlines[name]):
            means.append((math.fsum(values) / len(values), headlines[name]))
            shares &= all(0 <= value <= 1 for value in values)
    for scale in (100.0, 1.0):
        if means and all(_close(mean * scale, headline) for mean, headline in means):
            return scale, True
    percent = shares and any(abs(headline) > 1 for _, headline in means)
    return (100.0 if percent else 1.0), False


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _pair(
    names: tuple[str, str],
    first: ExampleFile,
    second: ExampleFile,
    scale: float,
    direction: str,
    how: _How,
) -> Pair:
    both = [key for key in first.values if key in second.values]
    counts = {
        "num_only_first": len(first.values) - len(both),
        "num_only_second": len(second.values) - len(both),
        "num_without_value": 0,
    }
    if first.value_name != second.value_name:
        other = f"the first value is {first.value_name} of one and {second.value_name} of the other"
        return _unpaired(names, f"not the same: {other}", counts)
    scored = {
        key: (a, b)
        for key in both
        if (a := first.values[key]) is not None and (b := second.values[key]) is not None
    }
    counts["num_without_value"] = len(both) - len(scored)
    if not scored:
        return _unpaired(names, "no example in common that both have a value for", counts)
    a, b = zip(*scored.values(), strict=True)
    difference = paired_difference(a, b, seed=how.seed, resamples=how.resamples)
    changes = {key: after - before for key, (before, after) in scored.items()}
    sign = -1 if direction == "lower" else 1
    return Pair(
        *names,
        difference=difference.scaled(scale),
        p_holm=None,
        unpaired=None,
        wins=_contrasts(_largest(changes, sign, how.shown), changes, first, second),
        losses=_contrasts(_largest(changes, -sign, how.shown), changes, first, second),
        **counts,
    )


def _unpaired(names: tuple[str, str], why: str, counts: Mapping[str, int]) -> Pair:
    return Pair(*names, difference=None, p_holm=None, unpaired=why, wins=(), losses=(), **counts)


def _largest(changes: Mapping[str, float], sign: int, count: int) -> list[str]:
    """Keys of the largest changes of that sign.

    Many are equal where values are 0 or 1. Their keys' hashes decide then: the first of the file would all
    be of its first category.
    """
    keys = (key for key, change in changes.items() if change * sign > 0)
    return heapq.nsmallest(count, keys, key=lambda key: (-sign * changes[key], _shuffled(key)))


def _shuffled(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _contrasts(
    keys: Sequence[str], changes: Mapping[str, float], first: ExampleFile, second: ExampleFile
) -> tuple[Contrast, ...]:
    mine, other = first.read(keys), second.read(keys)
    return tuple(Contrast(key, changes[key], mine[key], other[key]) for key in keys)
