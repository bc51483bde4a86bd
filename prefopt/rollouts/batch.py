"""A step's rollouts: everything that is known about them, on its way to the log and to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefopt.engines.base import Completion
from prefopt.engines.probe import Gap
from prefopt.rollouts.plan import Start
from prefopt.types import Group, Response


@dataclass(frozen=True)
class RolloutGroup:
    """The responses to one prompt, scored and labelled."""

    start: Start
    prompt_id: str
    prompt_ids: tuple[int, ...]
    """What the policy continued: the prompt, and the rolled-in prefix if there is one."""
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    """Without special tokens; a rolled-in prefix included, since the signal judges the whole response."""
    rewards: tuple[float, ...] | None = None
    """None: no signal, or a signal failed on this group. With ``offline_ids`` one more than completions."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Scores of each signal, before weighting."""
    offline_ids: tuple[int, ...] | None = None
    """The data set's own response, where the credit rule takes one: it is the last response then."""
    pairs: tuple[tuple[int, int], ...] = ()
    advantages: tuple[float, ...] | None = None
    skipped: str | None = None
    """Why there is nothing to learn from this group."""
    failed: str | None = None
    """What a signal raised or returned on this group."""

    @property
    def is_trained_on(self) -> bool:
        return self.skipped is None and self.failed is None

    def trainable(self, version: int) -> Group:
        """The group as the trainer sees it: without the responses that no label uses."""
        responses = [
            Response(c.ids, self._reward(i), version, c.logps, self._advantage(i))
            for i, c in enumerate(self.completions)
        ]
        if self.offline_ids is not None:
            responses.append(Response(self.offline_ids, self._reward(len(responses))))
        used = range(len(responses))
        if self.pairs and self.advantages is None:
            used = sorted({index for pair in self.pairs for index in pair})
        place = {index: position for position, index in enumerate(used)}
        return Group(
            id=self.prompt_id,
            prompt_ids=self.prompt_ids,
            responses=tuple(responses[index] for index in used),
            pairs=tuple((place[chosen], place[rejected]) for chosen, rejected in self.pairs),
        )

    def _reward(self, index: int) -> float | None:
        return None if self.rewards is None else self.rewards[index]

    def _advantage(self, index: int) -> float | None:
        return None if self.advantages is None else self.advantages[index]


@dataclass(frozen=True)
class RolloutBatch:
    """The groups one process sampled for one step."""

    step: int
    version: int
    """Policy version that sampled all of them."""
    groups: tuple[RolloutGroup, ...]
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds, by phase: ``generate_s``, ``score_s``."""
    reports: Mapping[str, float] = field(default_factory=dict)
    """What signals count of themselves (a judge's consistency, tokens), since the run was started."""
    gap: Gap | None = None
    """What the probe found after the push that this is the first batch of."""


def merge(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of all processes' shares, groups in the order one process would have sampled them.

    Timings are the slowest process's, the gap the widest, reports means over processes.
    """
    first = batches[0]
    groups = sorted((g for batch in batches for g in batch.groups), key=lambda g: g.start.place)
    names = {name for batch in batches for name in batch.timings}
    slowest = {n: max(batch.timings.get(n, 0.0) for batch in batches) for n in sorted(names)}
    gaps = [batch.gap for batch in batches if batch.gap is not None]
    worst = max(gaps, key=lambda gap: gap.mean, default=None)
    reports = {
        name: sum(values) / len(values)
        for name in sorted({name for batch in batches for name in batch.reports})
        if (values := [batch.reports[name] for batch in batches if name in batch.reports])
    }
    return RolloutBatch(first.step, first.version, tuple(groups), slowest, reports, worst)
