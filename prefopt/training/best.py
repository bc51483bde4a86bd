"""Which step was best by one logged metric: what checkpoint to keep for it, and when to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from prefopt.errors import ConfigError, suggest
from prefopt.model.distributed import told_by_main
from prefopt.recipe.schema import BestSection
from prefopt.training.metrics import LOSSES

logger = logging.getLogger(__name__)


class Best:
    """Follows one metric over the rows of ``metrics.jsonl``.

    The main process decides and tells the others: a time or a rate differs between processes.

    Args:
        section: the recipe's ``eval.best``.
        accelerator: of the run.
    """

    def __init__(self, section: BestSection, accelerator: Any) -> None:
        self.section = section
        self.accelerator = accelerator
        self.step: int | None = None
        """The step of the best value so far."""
        self.value = math.nan
        self.worse = 0
        """Values since then."""

    @property
    def stopped(self) -> bool:
        """Have as many values in a row been no better as `BestSection.patience` allows?"""
        patience = self.section.patience
        return patience is not None and self.worse >= patience

    def consider(self, row: Mapping[str, Any], step: int) -> bool:
        """Is ``row``, of ``step``, the best so far? A collective.

        A row without the metric says nothing. NaN is never better.
        Raises: ConfigError if the metric is not among those that such a row holds.
        """
        name = self.section.metric
        (value,) = told_by_main(self.accelerator, row.get(name))
        if value is None:
            self._check_name(row)
            return False
        if not self._is_better(value):
            self.worse += 1
            return False
        self.step, self.value, self.worse = step, value, 0
        return True

    def check_start(self, row: Mapping[str, Any]) -> None:
        """Refuses a held-out metric that the evaluation before the first step does not have."""
        if self.section.metric.startswith("eval/") and self.section.metric not in row:
            raise ConfigError(self._unknown(row))

    def result_step(self, last: int, total: int) -> int:
        """Whose weights the run of ``last`` steps ends with; says why, and whether it ended before ``total``."""
        name, step = self.section.metric, self.step
        if self.stopped and last < total:
            logger.info(
                "stopped at step %d of %d: no better for %d values", last, total, self.worse
            )
        if step is None:
            logger.warning("%s: no number was logged under this name; step %d stays", name, last)
            return last
        chosen = last if self.section.final == "last" else step
        logger.info(
            "%s was best at step %d: %.6g; the result is step %d", name, step, self.value, chosen
        )
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (JSON)."""
        return {"step": self.step, "value": self.value, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; from nothing where the run that saved had no ``eval.best``."""
        self.step, self.value, self.worse = (
            state.get("step"),
            state.get("value", math.nan),
            state.get("worse", 0),
        )

    def _is_better(self, value: float) -> bool:
        if self.step is None:
            return math.isfinite(value)
        gain = value - self.value if self.section.mode == "max" else self.value - value
        return gain > self.section.min_delta  # False for NaN

    def _check_name(self, row: Mapping[str, Any]) -> None:
        prefix = "eval/" if self.section.metric.startswith("eval/") else ""
        # With a loss in it, the row had something to learn from, and the objective's other metrics as well.
        if self.step is None and any(f"{prefix}{name}" in row for name in LOSSES):
            raise ConfigError(self._unknown(row))

    def _unknown(self, names: Any) -> str:
        name = self.section.metric
        known = sorted(n for n in names if n.startswith("eval/") == name.startswith("eval/"))
        return f"eval.best.metric = {name}: this run does not log it; {suggest(name, known)}"
