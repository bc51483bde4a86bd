"""What is logged of a step's rollouts (docs/metrics.md)."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import DataError
from prefopt.rollouts.batch import RolloutBatch, RolloutGroup
from prefopt.storage.run_files import read_metrics

logger = logging.getLogger(__name__)

Means = Mapping[str, tuple[float, float]]

# Of the built-in credit rules; a rule of a plugin may have others.
_REASONS = ("tie", "duplicate", "all_right", "all_wrong")


def rollout_metrics(batch: RolloutBatch, *, stale: bool, counts: bool) -> Means:
    """``{name: (sum, count)}`` of a merged batch; ``counts`` False zeroes all, for all but one process."""
    found: dict[str, tuple[float, float]] = {}
    groups = batch.groups
    completions = [c for group in groups for c in group.completions]
    num_groups, num_responses = len(groups), len(completions)
    found["rollout/lag"] = (batch.step - batch.version, 1)
    found["rollout/truncated_frac"] = (
        sum(c.stop_reason == "length" for c in completions),
        num_responses,
    )
    found["rollout/tokens"] = (sum(len(c.ids) for c in completions), num_responses)
    found["rollout/failed_frac"] = (sum(g.failed is not None for g in groups), num_groups)
    found["rollout/dropped_stale_frac"] = (num_groups if stale else 0, num_groups)
    found["credit/trained_frac"] = (sum(g.is_trained_on for g in groups), num_groups)
    # Every step counts in the mean of a logging window, also one in which a reason did not occur.
    skipped = Counter(group.skipped for group in groups if group.skipped)
    for reason in sorted({*_REASONS, *skipped}):
        found[f"credit/{reason}_frac"] = (skipped[reason], num_groups)
    found["credit/pairs"] = (sum(len(g.pairs) for g in groups), num_groups)
    found |= _reward_metrics(groups)
    # `wait_s` is the trainer's idle time: all of generating and scoring without a lag, what is left with one.
    found |= {f"time/{name}": (seconds, 1) for name, seconds in batch.timings.items()}
    found |= {f"signal/{name}": (value, 1) for name, value in batch.reports.items()}
    if batch.gap is not None:
        found["rollout/probe_gap_mean"] = (batch.gap.mean, 1)
        found["rollout/probe_gap_max"] = (batch.gap.max, 1)
    return found if counts else dict.fromkeys(found, (0.0, 0.0))


def _reward_metrics(groups: tuple[RolloutGroup, ...]) -> dict[str, tuple[float, float]]:
    """Mean reward and each part's mean over sampled responses, and the spread within groups."""
    found: dict[str, tuple[float, float]] = {}
    rewards = [g.rewards[: len(g.completions)] for g in groups if g.rewards is not None]
    if rewards:
        found["rollout/reward"] = (sum(map(sum, rewards)), sum(map(len, rewards)))
        found["rollout/reward_best"] = (sum(map(max, rewards)), len(rewards))
        found["rollout/reward_std"] = (sum(map(statistics.pstdev, rewards)), len(rewards))
    for name in sorted({name for group in groups for name in group.parts}):
        values = [g.parts[name][: len(g.completions)] for g in groups if name in g.parts]
        found[f"reward/{name}"] = (sum(map(sum, values)), sum(map(len, values)))
    return found


# Phases of a step. The engine's overlap with the trainer's under a lag; what does not is `wait_s`.
_PHASES = ("generate", "score", "sync", "wait", "train")


def time_split(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line: seconds a step by phase, means over the rows of a ``metrics.jsonl``."""
    parts = []
    for phase in _PHASES:
        seconds = [row[f"time/{phase}_s"] for row in rows if f"time/{phase}_s" in row]
        if seconds:
            name = "idle" if phase == "wait" else phase
            parts.append(f"{name} {statistics.fmean(seconds):.3g} s")
    return f"time of a step: {', '.join(parts)}"


def say_time_split(path: Path) -> None:
    """Logs `time_split` of a run's ``metrics.jsonl``."""
    try:
        logger.info("%s", time_split(read_metrics(path)))
    except DataError as error:  # somebody edits the file, and the weights are yet to be saved
        logger.warning("%s", error)
