"""Regimes: where the next global batch comes from. Here a fixed data set; rollouts: `prefopt.rollouts`."""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar, Protocol

import numpy as np

from prefopt.data.groups import GroupSource
from prefopt.errors import ConfigError
from prefopt.model.micro_batches import SplitLimits, forward_tokens
from prefopt.training.draws import RowDraw
from prefopt.training.windows import Window, make_window


class Regime(Protocol):
    """Gives the trainer its windows, one an optimizer step."""

    step: int
    """Optimizer steps whose windows have been given."""
    num_steps: int
    tied_to_processes: ClassVar[str | None]
    """Why it must go on on as many processes as it was on; None: who trains on a row changes nothing."""

    def next(self) -> Window:
        """The window of the next optimizer step; StopIteration after the last."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it (JSON)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the checkpoint's step; ConfigError if it was made with other data or settings."""
        ...

    @property
    def order_hash(self) -> str:
        """Hash of everything that decides which rows a step sees; recorded in run.json."""
        ...

    def close(self) -> None:
        """Frees engines and threads, if it has any."""
        ...


class OfflineRegime:
    """Windows over a fixed data set, in a new order each epoch; every row once an epoch, or by a `RowDraw`.

    The last window of an epoch holds what is left and is normalised by its own counts.

    Args:
        source: groups to train on.
        global_batch_size: groups per optimizer step over all processes.
        limits: size of one forward pass.
        seed: seed of the shuffles. Epoch e is a function of (seed, e) alone.
        shuffle: False takes the rows in their order in every epoch.
        num_epochs: passes over the data, or ``max_steps`` windows where given.
        draw: which rows are drawn and how; None: every row once an epoch. The number of steps is taken times its
            ``step_frac``.
        world_size, rank: processes, and which of them this is.
    """

    tied_to_processes: ClassVar[str | None] = None

    def __init__(
        self,
        source: GroupSource,
        *,
        global_batch_size: int,
        limits: SplitLimits,
        seed: int,
        shuffle: bool = True,
        num_epochs: float = 1.0,
        max_steps: int | None = None,
        draw: RowDraw | None = None,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.source = source
        self.draw = draw
        most = len(source) if draw is None else draw.most_at_once
        self.global_batch_size = global_batch_size if most is None else min(global_batch_size, most)
        self.limits = limits
        self.seed = seed
        self.shuffle = shuffle
        self.world_size = world_size
        self.rank = rank
        self.step = 0
        frac = 1.0 if draw is None else draw.step_frac
        num_rows = round(len(source) * frac)
        self.steps_per_epoch = math.ceil(num_rows / self.global_batch_size)
        steps = max_steps * frac if max_steps else self.steps_per_epoch * num_epochs
        self.num_steps = max(1, round(steps))
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
        return make_window(
            self.source,
            self.rows(step),
            self.limits,
            step=step,
            epoch=(step + 1) / self.steps_per_epoch,
            rank=self.rank,
            world_size=self.world_size,
        )

    def rows(self, step: int) -> list[int]:
        """Row indices of the global batch of ``step``, in drawn order."""
        size, draw = self.global_batch_size, self.draw
        if draw is not None and draw.weights is not None:
            return draw.draw(self.seed, step, size)
        seed = self.seed if self.shuffle else None
        num_rows = len(self.source) if draw is None else len(draw.rows)
        places = epoch_rows(seed, step, num_rows=num_rows, batch_size=size)
        return places if draw is None else draw.rows[places].tolist()

    def all_rows(self) -> list[int]:
        """Every row that some window of the run holds."""
        if self.draw is None and self.num_steps >= self.steps_per_epoch:
            return list(range(len(self.source)))
        return sorted({row for step in range(self.num_steps) for row in self.rows(step)})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the step, and hashes that tell whether it is the same data and order."""
        return {"step": self.step, "order": self.order_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the checkpoint's step; ConfigError if data, batch size or seed changed since."""
        if state["order"] != self.order_hash:
            raise ConfigError(
                "the checkpoint was made with other data, another data.seed, data.sampling, train.seed or "
                "train.shuffle, or another train.global_batch_size: its position means nothing here. Restore "
                "those settings, or start afresh in another run.output_dir"
            )
        self.step = state["step"]

    @property
    def order_hash(self) -> str:
        """Hash of everything that decides which rows a step sees; recorded in run.json."""
        order = self.seed if self.shuffle else "in order"
        text = f"{self.source.fingerprint}:{len(self.source)}:{self.global_batch_size}:{order}"
        if self.draw is not None:
            text += f":{self.draw.digest}"
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Nothing to free."""


def epoch_rows(seed: int | None, step: int, *, num_rows: int, batch_size: int) -> list[int]:
    """Rows of step ``step`` of a pass over ``num_rows`` in batches, each epoch a new permutation.

    Without a seed they come as they are. The last batch of an epoch holds what is left.
    """
    epoch, index = divmod(step, math.ceil(num_rows / batch_size))
    if seed is None:
        return list(range(index * batch_size, min(num_rows, (index + 1) * batch_size)))
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[index * batch_size : (index + 1) * batch_size].tolist()


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
