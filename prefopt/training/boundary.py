"""The last moment that a checkpoint can be of: between two optimizer steps."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.training.metrics import MeanMeter


@dataclass(frozen=True)
class Boundary:
    """What a step changes before the optimizer does: given back, the step might never have begun."""

    step: int
    random_state: Any
    numpy_state: Any
    torch_state: torch.Tensor
    cuda_state: torch.Tensor | None
    metrics: Any

    @staticmethod
    def here(step: int, meter: MeanMeter) -> Boundary:
        """The one that has just been reached, ``step`` steps done."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return Boundary(
            step,
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            cuda,
            meter.copied(),
        )

    def restore(self, meter: MeanMeter) -> None:
        """Random states and metrics as they were."""
        random.setstate(self.random_state)
        np.random.set_state(self.numpy_state)
        torch.set_rng_state(self.torch_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state)
        meter.put_back(self.metrics)
