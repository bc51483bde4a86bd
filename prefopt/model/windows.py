"""Windows: one optimizer step's groups, split over processes and micro-batches.

Which rank, which micro-batch: derived from lengths alone, the same on every process and without
communication, and the loss is divided by counts of the whole global batch. So any split of one global
batch gives the same gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prefopt.types import Group


class GroupSource(Protocol):
    """An indexable set of groups that knows its lengths without reading tokens (`data.TokenSet`)."""

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(n,) tokens of each prompt."""
        ...

    @property
    def response_lengths(self) -> Sequence[np.ndarray] | np.ndarray:
        """n arrays (K,): tokens of each response of a row; K may differ between rows."""
        ...

    @property
    def rewards(self) -> np.ndarray:
        """(n,) score of each row's first response, NaN where it has none: what sample rows are drawn by."""
        ...

    @property
    def advantages(self) -> np.ndarray:
        """(n,) advantage of each row's first response, NaN where it has none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of the rows."""
        ...

    def __len__(self) -> int: ...

    def group(self, index: int) -> Group: ...


class GroupList:
    """Groups in memory as a `GroupSource`, of any number of responses each."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in self.groups])
        self.response_lengths = [np.array([len(r.ids) for r in g.responses]) for g in self.groups]
        self.rewards = _or_nan([g.responses[0].score for g in self.groups])
        self.advantages = _or_nan([g.responses[0].advantage for g in self.groups])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.groups).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, index: int) -> Group:
        return self.groups[index]


def _or_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


@dataclass(frozen=True)
class MicroBatch:
    """Groups of one forward pass. ``counts`` False marks a filler: it runs, but adds nothing.

    A rank with fewer micro-batches than another must still run forward and backward as often, or
    collectives hang.
    """

    groups: tuple[Group, ...]
    counts: bool = True


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
    """Their tokens."""
    version: int | None = None
    """Policy version that sampled them."""
    max_policy_gap: float | None = None
    """Largest mean |policy - sampler| log-prob, nats a token; None where the two are not the same weights."""
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What the regime has to log: ``{name: (sum, count)}``, the same names on every process."""


@dataclass(frozen=True)
class SplitLimits:
    """How large one forward pass of one process may be."""

    max_tokens: int
    max_groups: int | None = None
    packed: bool = True


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
    # Every rank reads the whole window: which response of a group is the chosen one, its pairs say.
    groups = {row: source.group(row) for row in rows}
    batch = [groups[row] for row in rows]  # a row that was drawn twice counts twice
    chosen = [group.responses[pair[0]] for group in batch for pair in group.pairs]
    samples = [r for g in batch for r, counts in zip(g.responses, g.samples, strict=True) if counts]
    shares = _shares(source, rows, world_size)
    ranks = [split_micro_batches(source, share, limits) for share in shares]
    most = max(1, *(len(batches) for batches in ranks))
    mine = [MicroBatch(tuple(groups[row] for row in batch)) for batch in ranks[rank]]
    if filler is None:
        filler = groups[min(rows, key=lambda row: _cost(source, row))]
    return Window(
        step=step,
        epoch=epoch,
        micro_batches=(*mine, *[MicroBatch((filler,), counts=False)] * (most - len(mine))),
        num_pairs=len(chosen),
        num_chosen_tokens=sum(len(response.ids) for response in chosen),
        num_samples=len(samples),
        num_sample_tokens=sum(len(response.ids) for response in samples),
        version=version,
        max_policy_gap=max_policy_gap,
        metrics=metrics or {},
    )


# Micro-batches that a row may still join. With rows longest first, older ones are as good as full, and
# a bound keeps a pass over 60,000 rows from comparing each with thousands of them.
_OPEN_BATCHES = 32


def split_micro_batches(
    source: GroupSource, rows: Sequence[int], limits: SplitLimits
) -> list[list[int]]:
    """Rows in few micro-batches that fit ``limits``: longest first, each into the first that has room."""
    tokens = {row: forward_tokens(source, row, limits.packed) for row in rows}
    batches: list[list[int]] = []
    loads: list[int] = []
    for row in sorted(rows, key=lambda r: (tokens[r], r), reverse=True):
        for index in range(max(0, len(batches) - _OPEN_BATCHES), len(batches)):
            batch = batches[index]
            # Padded, a shorter row takes as much as the longest of its batch, which is the first.
            load = loads[index] + tokens[row if limits.packed else batch[0]]
            if load <= limits.max_tokens and len(batch) != limits.max_groups:
                batch.append(row)
                loads[index] = load
                break
        else:
            batches.append([row])
            loads.append(tokens[row])
    return batches


def longest_row_tokens(source: GroupSource, packed: bool) -> int:
    """Tokens of the largest forward that a single row can need."""
    return max(forward_tokens(source, row, packed) for row in range(len(source)))


def forward_tokens(source: GroupSource, row: int, packed: bool) -> int:
    """Tokens of a forward over one row alone: prompt once and no padding if packed, else both in full."""
    prompt, responses = int(source.prompt_lengths[row]), source.response_lengths[row]
    if packed:
        return prompt + int(responses.sum())
    return (prompt + int(responses.max())) * len(responses)


def _shares(source: GroupSource, rows: Sequence[int], world_size: int) -> list[list[int]]:
    """Deals rows over ranks, longest first and back and forth: equal counts, near-equal tokens."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for place, row in enumerate(sorted(rows, key=lambda r: _cost(source, r), reverse=True)):
        lap, seat = divmod(place, world_size)
        shares[seat if lap % 2 == 0 else world_size - 1 - seat].append(row)
    return shares


def _cost(source: GroupSource, row: int) -> tuple[int, int]:
    return int(source.prompt_lengths[row] + source.response_lengths[row].sum()), row
