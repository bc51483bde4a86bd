"""Regimes: where the next global batch comes from, and how it is split over processes.

The recipe sets the global batch. Everything else (which rank, which micro-batch) is derived here, from
lengths alone, the same on every process and without communication, so that a run is reproduced by its
seed and resumed by its step, and so that the loss can be divided by counts of the whole global batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prefopt.errors import ConfigError
from prefopt.types import Group


class GroupSource(Protocol):
    """An indexable set of groups that knows its lengths without reading tokens (`data.TokenSet`)."""

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(n,) tokens of each prompt."""
        ...

    @property
    def response_lengths(self) -> np.ndarray:
        """(n, K) tokens of each response."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of the rows."""
        ...

    def __len__(self) -> int: ...

    def group(self, index: int) -> Group: ...


class GroupList:
    """Groups in memory as a `GroupSource`; all must have the same number of responses."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in self.groups])
        self.response_lengths = np.array([[len(r.ids) for r in g.responses] for g in self.groups])
        self.fingerprint = hashlib.sha256(repr(self.groups).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, index: int) -> Group:
        return self.groups[index]


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


@dataclass(frozen=True)
class SplitLimits:
    """How large one forward pass of one process may be."""

    max_tokens: int
    max_groups: int | None = None
    packed: bool = True


class OfflineRegime:
    """Windows over a fixed data set, shuffled anew each epoch; every row once an epoch, none dropped.

    The last window of an epoch holds what is left and is normalised by its own counts.

    Args:
        source: groups to train on.
        global_batch_size: groups per optimizer step over all processes.
        limits: size of one forward pass.
        seed: seed of the shuffles. Epoch e is a function of (seed, e) alone.
        num_epochs: passes over the data, or ``max_steps`` windows where given.
        world_size, rank: processes, and which of them this is.
    """

    def __init__(
        self,
        source: GroupSource,
        *,
        global_batch_size: int,
        limits: SplitLimits,
        seed: int,
        num_epochs: float = 1.0,
        max_steps: int | None = None,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.source = source
        self.global_batch_size = min(global_batch_size, len(source))
        self.limits = limits
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.step = 0
        self.steps_per_epoch = math.ceil(len(source) / self.global_batch_size)
        self.num_steps = max_steps or max(1, round(self.steps_per_epoch * num_epochs))
        _check_sizes(source, self.global_batch_size, limits, world_size)

    def next(self) -> Window:
        """The window of the next optimizer step; StopIteration after the last."""
        if self.step >= self.num_steps:
            raise StopIteration
        window = self.window(self.step)
        self.step += 1
        return window

    def window(self, step: int) -> Window:
        """The window of optimizer step ``step``: a pure function of the step."""
        rows = self.rows(step)
        # Every rank reads the whole window: which response of a group is the chosen one, its pairs say.
        groups = {row: self.source.group(row) for row in rows}
        pairs = [(group, chosen) for group in groups.values() for chosen, _ in group.pairs]
        ranks = [
            split_micro_batches(self.source, share, self.limits) for share in self._shares(rows)
        ]
        most = max(len(batches) for batches in ranks)
        mine = [MicroBatch(tuple(groups[row] for row in batch)) for batch in ranks[self.rank]]
        filler = MicroBatch((groups[min(rows, key=self._cost)],), counts=False)
        return Window(
            step=step,
            epoch=(step + 1) / self.steps_per_epoch,
            micro_batches=(*mine, *[filler] * (most - len(mine))),
            num_pairs=len(pairs),
            num_chosen_tokens=sum(len(group.responses[chosen].ids) for group, chosen in pairs),
        )

    def rows(self, step: int) -> list[int]:
        """Row indices of the global batch of ``step``, in drawn order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
        return order[index * self.global_batch_size : (index + 1) * self.global_batch_size].tolist()

    def all_rows(self) -> list[int]:
        """Every row that some window of the run holds."""
        if self.num_steps >= self.steps_per_epoch:
            return list(range(len(self.source)))
        return sorted({row for step in range(self.num_steps) for row in self.rows(step)})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the step, and hashes that tell whether it is the same data and order."""
        return {"step": self.step, "order": self.order_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the checkpoint's step; ConfigError if data, batch size or seed changed since."""
        if state["order"] != self.order_hash:
            raise ConfigError(
                "the checkpoint was made with other data, another data.seed/train.seed or another "
                "train.global_batch_size: its position means nothing here. Restore those settings, or start "
                "afresh in another run.output_dir"
            )
        self.step = state["step"]

    @property
    def order_hash(self) -> str:
        """Hash of everything that decides which rows a step sees; recorded in run.json."""
        text = f"{self.source.fingerprint}:{len(self.source)}:{self.global_batch_size}:{self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _shares(self, rows: list[int]) -> list[list[int]]:
        """Deals rows over ranks, longest first and back and forth: equal counts, near-equal tokens."""
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        for place, row in enumerate(sorted(rows, key=self._cost, reverse=True)):
            lap, seat = divmod(place, self.world_size)
            shares[seat if lap % 2 == 0 else self.world_size - 1 - seat].append(row)
        return shares

    def _cost(self, row: int) -> tuple[int, int]:
        return int(self.source.prompt_lengths[row] + self.source.response_lengths[row].sum()), row


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


def _check_sizes(source: GroupSource, batch: int, limits: SplitLimits, world_size: int) -> None:
    problems = []
    if batch < world_size:
        problems.append(
            f"{world_size} processes share a global batch of {batch} pairs ({len(source)} in the data): "
            "some would have nothing to do; start fewer processes or raise train.global_batch_size"
        )
    elif batch % world_size:
        below, above = batch // world_size * world_size, math.ceil(batch / world_size) * world_size
        problems.append(
            f"train.global_batch_size = {batch}: does not divide over {world_size} processes, so one rank "
            f"would wait for another every step; use {below} or {above}"
        )
    longest = max(range(len(source)), key=lambda row: forward_tokens(source, row, limits.packed))
    need = forward_tokens(source, longest, limits.packed)
    if need > limits.max_tokens:
        problems.append(
            f"train.micro_batch_tokens = {limits.max_tokens}: the longest pair has {need} tokens (row "
            f"{source.group(longest).id}); raise it, or lower data.max_length_tokens to drop such rows"
        )
    if problems:
        raise ConfigError(problems)
