"""After every push: do the engine and the trainer give the same log-probs?

An engine that still serves old weights, a merged adapter, a template applied twice or a lossy dtype all
train without complaint and learn less. A few prompts scored on both sides tell at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from prefopt.engines.base import Engine
from prefopt.engines.probe import Gap, check_gap, compare_logps
from prefopt.model.logps import LogpModel
from prefopt.model.sweep import LayoutFn
from prefopt.types import Group, Prompt, Response

logger = logging.getLogger(__name__)

_NUM_SEQUENCES = 4
_MOST_TOKENS = 256


class Probe:
    """Compares engine and trainer on a few prompts, each split into a context and a continuation.

    Args:
        model: the prepared (wrapped) `LogpModel`.
        prompts: of the run; the longest (up to 256 tokens) are taken.
        layout: how the model takes its tokens.
        limit: largest mean |difference|, nats a token.
    """

    nowhere = Path("/nonexistent")
    """Path of a policy that is not on disk, because the engine shares the trainer's weights."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        accelerator: Accelerator,
        *,
        layout: LayoutFn,
        limit: float,
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.limit = limit
        self._layout = layout
        self._gap: Gap | None = None
        ids = sorted({prompt.ids[:_MOST_TOKENS] for prompt in prompts}, key=lambda p: (-len(p), p))
        usable = [sequence for sequence in ids if len(sequence) >= 2][:_NUM_SEQUENCES]
        self.sequences = [(s[: len(s) // 2], s[len(s) // 2 :]) for s in usable]

    def expected(self) -> list[list[float]]:
        """The trainer's log-probs of the sequences, now, at temperature 1. A collective."""
        trained = cast(LogpModel, self.accelerator.unwrap_model(self.model))
        temperature, was_training = trained.temperature, self.model.training
        groups = [
            Group(f"probe {index}", context, (Response(rest),))
            for index, (context, rest) in enumerate(self.sequences)
        ]
        self.model.eval()
        trained.temperature = 1.0
        try:
            with torch.no_grad():
                logps = self.model(self._layout(groups).to(self.accelerator.device)).float()
        finally:
            trained.temperature = temperature
            self.model.train(was_training)
        lengths = [len(rest) for _, rest in self.sequences]
        return [row[:length].tolist() for row, length in zip(logps, lengths, strict=True)]

    def check(self, engine: Engine, expected: Sequence[Sequence[float]], version: int) -> None:
        """Scores the sequences with ``engine``. Raises: EngineError if the two differ beyond the limit."""
        gap = compare_logps(engine.score(self.sequences), expected)
        self._gap = gap
        check_gap(gap, self.limit, version)

    def take(self) -> Gap | None:
        """The gap of the last push, once."""
        gap, self._gap = self._gap, None
        return gap
