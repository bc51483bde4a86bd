"""Windows: one optimizer step's groups, split over processes and micro-batches.

Which rank, which micro-batch: derived from lengths alone, the same on every process and without
communication, and the loss is divided by counts of the whole global batch. So any split of one global
batch gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefopt.data.groups import GroupSource
from prefopt.model.micro_batches import SplitLimits, split_micro_batches
from prefopt.types import Group


@dataclass(frozen=True)
class MicroBatch:
    """Groups of one forward pass. ``counts`` False marks a filler: it runs, but adds nothing.

    A rank with fewer micro-batches than another must still run forward and backward as often, or
    collectives hang.
    """

    groups: tuple[Group, ...]
    counts: bool = True

    @property
    def num_row_tokens(self) -> int:
        """Its share of `Window.num_row_tokens`; none of a filler."""
        rows = ((g.prompt_ids, r.ids) for g in self.groups for r in g.responses)
        return sum(len(prompt) + len(ids) for prompt, ids in rows) if self.counts else 0


@dataclass(frozen=True)
class Window:
    """One optimizer step as one process sees it; the totals are those of all processes."""

    step: int
    epoch: float
    micro_batches: tuple[MicroBatch, ...]
    num_pairs: int
    """Pairs of the global batch."""
    num_chosen_tokens: int
    """Chosen response tokens of the global batch."""
    num_samples: int = 0
    """Responses of the global batch that stand by themselves (`Group.samples`)."""
    num_sample_tokens: int = 0
    """Their tokens that carry loss."""
    num_row_tokens: int = 0
    """Tokens of the global batch's rows, one row a response with its prompt."""
    version: int | None = None
    """Policy version that sampled them."""
    max_policy_gap: float | None = None
    """Largest mean |policy - sampler| log-prob, nats a token; None where the two are not the same weights."""
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What the regime has to log: ``{name: (sum, count)}``, the same names on every process."""


def make_window(
    source: GroupSource,
    rows: Sequence[int],
    limits: SplitLimits,
    *,
    step: int,
    epoch: float,
    rank: int,
    world_size: int,
    filler: Group | None = None,
    version: int | None = None,
    max_policy_gap: float | None = None,
    metrics: Mapping[str, tuple[float, float]] | None = None,
) -> Window:
    """The window of ``rows`` for one rank.

    Args:
        rows: indices into ``source``; the whole global batch. May be empty if there is a ``filler``.
        version: of the policy that sampled the rows, if one did.
        max_policy_gap: see `Window`.
        filler: what a rank without anything to do runs; default: the shortest row.
    """
    # Of the whole window only lengths and labels: tokens are read by the rank that trains on them.
    counted = {row: source.num_loss_tokens[row].tolist() for row in rows}
    chosen = [counted[row][pair[0]] for row in rows for pair in source.pairs(row)]
    samples = [
        n
        for row in rows
        for n, counts in zip(counted[row], source.samples(row), strict=True)
        if counts
    ]
    shares = _shares(source, rows, world_size)
    ranks = [split_micro_batches(source, share, limits) for share in shares]
    most = max(1, *(len(batches) for batches in ranks))
    mine = [MicroBatch(tuple(map(source.group, batch))) for batch in ranks[rank]]
    if len(mine) < most:
        spare = filler or source.group(min(rows, key=lambda row: _cost(source, row)))
        mine += [MicroBatch((spare,), counts=False)] * (most - len(mine))
    return Window(
        step=step,
        epoch=epoch,
        micro_batches=tuple(mine),
        num_pairs=len(chosen),
        num_chosen_tokens=sum(chosen),
        num_samples=len(samples),
        num_sample_tokens=sum(samples),
        num_row_tokens=sum(_row_tokens(source, row) for row in rows),
        version=version,
        max_policy_gap=max_policy_gap,
        metrics=metrics or {},
    )


def _shares(source: GroupSource, rows: Sequence[int], world_size: int) -> list[list[int]]:
    """Deals rows over ranks, longest first and back and forth: equal counts, near-equal tokens."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for place, row in enumerate(sorted(rows, key=lambda r: _cost(source, r), reverse=True)):
        lap, seat = divmod(place, world_size)
        shares[seat if lap % 2 == 0 else world_size - 1 - seat].append(row)
    return shares


def _row_tokens(source: GroupSource, row: int) -> int:
    lengths = source.response_lengths[row]
    return int(source.prompt_lengths[row]) * len(lengths) + int(lengths.sum())


def _cost(source: GroupSource, row: int) -> tuple[int, int]:
    return int(source.prompt_lengths[row] + source.response_lengths[row].sum()), row
