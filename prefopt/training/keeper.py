"""What is kept of a run: its checkpoints, at their period and when it ends before its last step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from prefopt.errors import TrainingError
from prefopt.model.distributed import is_on_all_ranks
from prefopt.process.progress import progress
from prefopt.reference.base import Reference
from prefopt.training.best import Best
from prefopt.training.boundary import Boundary
from prefopt.training.checkpoint import Checkpoints
from prefopt.training.generation_probe import GenerationProbe
from prefopt.training.metrics import MeanMeter
from prefopt.training.regimes import Regime

logger = logging.getLogger(__name__)

# A checkpoint is written in one go, and storage may be slow.
_LONGEST_SAVE_S = 3600.0


class Keeper:
    """Saves a run and brings it back.

    Args:
        checkpoints: where.
        regime, meter, reference, probe, best: what has a state beside the weights.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        accelerator: Accelerator,
        regime: Regime,
        meter: MeanMeter,
        reference: Reference | None,
        probe: GenerationProbe | None,
        best: Best | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.accelerator = accelerator
        self.regime = regime
        self.meter = meter
        self.reference = reference
        self.probe = probe
        self.best = best
        self.open_row: dict[str, Any] | None = None
        """A row of metrics.jsonl that lacks its evaluation: it was interrupted, and is done after the resume."""
        self.saved = checkpoints.newest_step()
        """Step of the newest checkpoint."""

    def save(self, step: int, open_window_s: float) -> None:
        """Writes the checkpoint of ``step``. A collective.

        Args:
            open_window_s: seconds since the last row of metrics.jsonl.
        """
        progress.enter(f"saving the checkpoint of step {step}", at_most_s=_LONGEST_SAVE_S)
        state: dict[str, Any] = {
            "regime": self.regime.state_dict(),
            "num_processes": self.accelerator.num_processes,
            # A checkpoint may fall between two rows of metrics.jsonl: the next row is of the whole window.
            "metrics": self.meter.state_dict(self.accelerator),
            "open_window_s": open_window_s,
        }
        if self.open_row is not None:
            state["open_row"] = self.open_row
        if self.probe is not None:
            state["generation_probe"] = self.probe.state_dict()
        if self.best is not None:
            state["best"] = self.best.state_dict()
        tensors = {} if self.reference is None else self.reference.state()
        self.checkpoints.save(step, state, tensors)
        self.saved = step
        self.reached(step)

    def restore(self, path: Path) -> Mapping[str, Any]:
        """Weights, optimizer, random states and position of a checkpoint; returns its state.

        Raises: ConfigError if it is of other weights, data or processes; TrainingError if it is damaged.
        """
        state = self.checkpoints.load(path, tied=self.regime.tied_to_processes)
        self.regime.load_state_dict(state["regime"])
        if self.reference is not None:
            self.reference.load_state(self.checkpoints.load_tensors(path))
        self.meter.load_state_dict(state["metrics"], self.accelerator)
        self.open_row = state.get("open_row")
        if self.probe is not None:
            self.probe.load_state_dict(state.get("generation_probe", {}))
        if self.best is not None:
            self.best.load_state_dict(state.get("best", {}))
            self.checkpoints.kept_step = self.best.step
        self.saved = self.regime.step
        self.reached(self.regime.step)
        logger.info("resumed from %s (step %d)", path, self.regime.step)
        return state

    def reached(self, step: int) -> None:
        """``step`` steps are done: what is on disk of them is what the end of the process will say."""
        if self.saved is None:
            progress.stands = f"none of its {step} steps was saved (train.save_every)"
        else:
            total, where = self.regime.num_steps, self.checkpoints.root
            progress.stands = (
                f"saved step {self.saved} of {total} in {where}; run the same command to go on"
            )

    def can_go_back(self, error: BaseException) -> bool:
        """Can what came before the step that raised this be saved, by all processes together?

        Only if nothing of the step is in the weights yet, which is for the caller to know.
        """
        if getattr(error, "at_once", False):
            return False
        steps_in_backward = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        alone = self.accelerator.num_processes == 1 and not steps_in_backward
        return alone or is_on_all_ranks(error)

    def go_back(self, boundary: Boundary, open_window_s: float) -> None:
        """Saves the moment before a step that was given up, where there is something that is not saved yet."""
        boundary.restore(self.meter)
        self.regime.load_state_dict({**self.regime.state_dict(), "step": boundary.step})
        if boundary.step == 0 or self.saved == boundary.step:
            return
        try:
            self.save(boundary.step, open_window_s)
        except TrainingError as error:  # a full disk, say; why the run ends is another's to say
            logger.warning("%s", error)
