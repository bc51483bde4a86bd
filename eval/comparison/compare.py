"""``prefopt eval compare A B …``: every later result against the first, example by example, paired by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.comparison.comparability import head_remarks, mismatches, refuse, remarks
from eval.comparison.frontier import frontier
from eval.comparison.outputs import Output, open_outputs
from eval.comparison.paired import RESAMPLES, holm
from eval.comparison.pairing import How, compare_task
from eval.comparison.table import print_comparison
from eval.comparison.tree import Comparison, TaskComparison, comparison_json
from prefopt.errors import ConfigError

__all__ = ["Comparison", "compare", "comparison_json", "print_comparison"]

_SHOWN = 5


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
    how = How(seed, resamples, shown)
    tasks = [
        compare_task(task, those, [o for o in outputs if o not in those], differing[task], how)
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
