"""What each step samples, decided before anything is sampled: versions, prompts, prefixes, seeds.

Everything here is a pure function of the step and the run's seed. That is what makes an asynchronous run
repeatable, a resumed one exact, and a batch found in the experience log the batch that was wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from prefopt.types import Prompt

_STREAM_ORDER, _STREAM_RESET, _STREAM_REPLACE = range(3)


@dataclass(frozen=True)
class Schedule:
    """Which policy version samples the batch of which step.

    A version is the optimizer step of its weights. Weights are pushed at multiples of ``sync_every``
    (None: only at step 0), and generation runs at most ``max_lag`` steps ahead of training.
    """

    sync_every: int | None
    max_lag: int

    def version_of(self, step: int) -> int:
        """The version that samples the batch of ``step``: the newest push once step - max_lag is reached."""
        if self.sync_every is None:
            return 0
        return max(0, step - self.max_lag) // self.sync_every * self.sync_every

    def pushes_at(self, step: int) -> bool:
        """Are the weights before optimizer step ``step`` pushed to the engine?"""
        return step == 0 if self.sync_every is None else step % self.sync_every == 0

    @property
    def most_lag(self) -> int | None:
        """Largest step - version that can occur; None where nothing is ever pushed again."""
        return None if self.sync_every is None else self.max_lag + self.sync_every - 1


@dataclass(frozen=True)
class Start:
    """Where the rollouts of one group begin."""

    place: int
    """Position in the step's batch; replacements of groups without a label come after all of them."""
    row: int
    """Index of the prompt in the prompt set."""
    prefix: tuple[int, ...]
    """Tokens of the data's own response that the rollouts continue; empty without a reset."""
    seeds: tuple[int, ...]
    """One a response."""


@dataclass(frozen=True)
class PromptPlan:
    """Prompts of each step: every one once an epoch, each epoch in a new order, batches of one size.

    Args:
        prompts: of the run.
        seed: of order, prefixes and samples.
        per_step: prompts a step.
        num_samples: responses a prompt.
        reset_frac: share of prompts whose rollouts start inside the data's own response.
    """

    prompts: Sequence[Prompt]
    seed: int
    per_step: int
    num_samples: int
    reset_frac: float = 0.0

    def starts(self, step: int) -> list[Start]:
        """The groups of ``step``, in order."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._start(step, place, self._row(p)) for place, p in enumerate(positions)]

    def replacements(self, step: int, places: Sequence[int], attempt: int) -> list[Start]:
        """Other prompts for the groups at ``places`` that gave no label; ``attempt`` counts from 1."""
        taken = {start.row for start in self.starts(step)}
        everyone_is = len(taken) == len(self.prompts)
        result = []
        for place in places:
            draw = self._rng(_STREAM_REPLACE, step, place, attempt)
            row = int(draw.integers(len(self.prompts)))
            while row in taken and not everyone_is:
                row = int(draw.integers(len(self.prompts)))
            result.append(self._start(step, place + attempt * self.per_step, row))
        return result

    def num_steps(self, num_epochs: float) -> int:
        """Steps in which every prompt is met ``num_epochs`` times."""
        return max(1, round(math.ceil(len(self.prompts) / self.per_step) * num_epochs))

    def epoch(self, step: int) -> float:
        """Passes over the prompts after ``step``."""
        return (step + 1) * self.per_step / len(self.prompts)

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[index])

    def _start(self, step: int, place: int, row: int) -> Start:
        seeds = tuple(_seed(self.seed, step, place, sample) for sample in range(self.num_samples))
        return Start(place, row, self._prefix(step, place, row), seeds)

    def _prefix(self, step: int, place: int, row: int) -> tuple[int, ...]:
        """DR-PO's reset (arXiv:2404.08495): 1 to len - 1 tokens of the offline response, uniformly."""
        offline = self.prompts[row].offline_ids
        if not self.reset_frac or offline is None or len(offline) < 2:
            return ()
        draw = self._rng(_STREAM_RESET, step, place)
        if draw.random() >= self.reset_frac:
            return ()
        return offline[: int(draw.integers(1, len(offline)))]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


@lru_cache(maxsize=2)  # a step looks its prompts up one by one
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, _STREAM_ORDER, epoch]).permutation(count)


def _seed(*key: int) -> int:
    """A seed below 2^62: engines take signed 64-bit ones."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
