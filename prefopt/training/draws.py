"""Which rows of a data set of weighted samples the steps of a run draw, and which the objective learns from.

A-LoL's code draws by advantage: rows that its objective would only multiply by zero cost no forward, and a step of
a given size is a step of rows that teach.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from prefopt.data.groups import GroupSource
from prefopt.data.samples import SampleNeeds, target_problem
from prefopt.errors import DataError
from prefopt.recipe.registry import BoundObjective, Need
from prefopt.recipe.schema import DataSection, SamplingSection
from prefopt.types import ResponseLogps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowDraw:
    """Rows that may be drawn, how likely each is, and what an epoch of them is. A function of (seed, step) alone.

    Attributes:
        name: of the recipe's ``data.sampling``.
        rows: (m,) indices of the rows that can be drawn, of ``num_rows``.
        weights: (m,) above 0, probability ∝ weight; None: every one of ``rows`` once an epoch, in a new order.
        replacement: with ``weights``, draw each row of a step on its own; else no row twice in a step.
        scale_steps: an epoch is as many draws as there are ``rows``; else as there are rows in the data.
    """

    name: str
    rows: np.ndarray
    num_rows: int
    weights: np.ndarray | None = None
    replacement: bool = True
    scale_steps: bool = True

    @property
    def drawable_frac(self) -> float:
        return len(self.rows) / self.num_rows

    @property
    def step_frac(self) -> float:
        """What a number of steps is taken times."""
        return self.drawable_frac if self.scale_steps else 1.0

    @property
    def most_at_once(self) -> int | None:
        """Most rows a step can hold; None where one may come twice."""
        return None if self.weights is not None and self.replacement else len(self.rows)

    def draw(self, seed: int, step: int, size: int) -> list[int]:
        """The rows of ``step``, drawn by ``weights``."""
        assert self.weights is not None
        rng = np.random.default_rng([seed, step, _STREAM])
        if self.replacement:
            found = np.searchsorted(self._sums, rng.random(size) * self._sums[-1], side="right")
            places = found.clip(max=len(self.rows) - 1)  # u · total may round up to the total
        else:
            # Efraimidis and Spirakis 2006: the smallest of Exp(1) / w are draws without replacement.
            keys = rng.exponential(size=len(self.rows)) / self.weights
            # A step draws few of many rows: only those few are sorted.
            few = (
                np.argpartition(keys, size - 1)[:size] if size < len(keys) else np.arange(len(keys))
            )
            places = few[np.argsort(keys[few], kind="stable")]
        return self.rows[places].tolist()

    @cached_property
    def _sums(self) -> np.ndarray:
        assert self.weights is not None
        return self.weights.cumsum()

    @cached_property
    def digest(self) -> str:
        """Changes whenever some draw would."""
        weights = b"" if self.weights is None else self.weights.tobytes()
        text = f"{self.replacement}:{self.scale_steps}:{self.num_rows}:".encode()
        return hashlib.sha256(text + self.rows.tobytes() + weights).hexdigest()

    def summary(self, num_steps: int) -> str:
        """What the log says of it."""
        scaled = f"; the steps are taken times that share: {num_steps}" if self.scale_steps else ""
        how = "each once an epoch"
        if self.weights is not None:
            how = "with replacement" if self.replacement else "none twice in a step"
        return (
            f"sampling by {self.name}, {how}: {len(self.rows)} of {self.num_rows} rows can be drawn "
            f"({100 * self.drawable_frac:.1f}%){scaled}"
        )

    def describe(self) -> dict[str, Any]:
        """For the run's record."""
        return {
            "name": self.name,
            "replacement": self.weights is not None and self.replacement,
            "drawable_rows": len(self.rows),
            "drawable_frac": self.drawable_frac,
            "steps_times": self.step_frac,
        }


_STREAM = 0x5A  # apart from the generators of (seed, epoch)


def build_draw(
    section: SamplingSection, objective: BoundObjective, source: GroupSource
) -> RowDraw | None:
    """How rows are drawn, None for every row once an epoch.

    Raises: DataError if the objective learns from no row, or no row can be drawn; both say the best label.
    """
    return _draw(section, objective, source, row_gradients(objective, source))


def _draw(
    section: SamplingSection, objective: BoundObjective, source: GroupSource, pushes: np.ndarray
) -> RowDraw | None:
    if not pushes.any():
        raise DataError(_nothing_learnt(objective, source))
    name = section.name
    if name == "uniform":
        return None
    weights = _weights(name, objective, source, pushes)
    rows = np.flatnonzero(weights > 0)
    if not len(rows):
        by_reward = name == "reward" or (
            name == "positive" and Need.ADVANTAGES not in objective.needs
        )
        what, labels = ("reward", source.rewards) if by_reward else ("advantage", source.advantages)
        raise DataError(
            f"data.sampling.name = '{name}': draws none of {len(source)} rows, since no {what} is above 0 "
            f"(the highest: {_highest(source, labels)})"
        )
    # Of equal weights, drawing without replacement until none is left is a pass in a new order.
    is_pass = name == "positive" and not section.replacement
    return RowDraw(
        name,
        rows,
        len(source),
        None if is_pass else weights[rows],
        section.replacement,
        section.scale_steps,
    )


def _weights(
    name: str, objective: BoundObjective, source: GroupSource, pushes: np.ndarray
) -> np.ndarray:
    """(n,) what the probability of each row is in proportion to; NaN labels draw nothing."""
    if name == "reward":
        return np.nan_to_num(source.rewards, nan=0.0).clip(min=0)
    advantages = np.nan_to_num(source.advantages, nan=0.0).clip(min=0)
    if name == "advantage":
        return advantages
    if Need.ADVANTAGES in objective.needs:
        return (advantages > 0).astype(np.float64)
    return (pushes > 0).astype(np.float64)


def row_gradients(objective: BoundObjective, source: GroupSource) -> np.ndarray:
    """(n,) how hard the objective raises each row's log-prob where the policy is its reference; 0: not at all.

    Asked of the objective itself, on one token a row: a rule of which rows count would be a second definition of
    it.
    """
    count = len(source)
    policy = torch.full((count, 1), -1.0, requires_grad=True)
    output = objective(
        ResponseLogps(
            policy=policy,
            mask=torch.ones(count, 1, dtype=torch.bool),
            pairs=torch.empty(0, 2, dtype=torch.long),
            reference=policy.detach(),
            rewards=_column(source.rewards),
            advantages=_column(source.advantages),
            samples=torch.ones(count, dtype=torch.bool),
            group=torch.arange(count),
        )
    )
    losses = [output.sample_losses, output.sample_token_losses]
    total = sum(part.sum() for part in losses if part is not None)
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return np.zeros(count)
    (gradient,) = torch.autograd.grad(total, policy)
    return -gradient[:, 0].numpy()


def label_statistics(source: GroupSource) -> dict[str, dict[str, float]]:
    """Range, mean and standard deviation of the rewards and advantages of samples, for the run's record."""
    found = {}
    for name, values in (("rewards", source.rewards), ("advantages", source.advantages)):
        known = values[~np.isnan(values)]
        if len(known):
            numbers = {
                "min": known.min(),
                "max": known.max(),
                "mean": known.mean(),
                "std": known.std(),
            }
            found[name] = {key: float(value) for key, value in numbers.items()}
            found[name]["rows"] = len(known)
    if "advantages" in found:
        known = source.advantages[~np.isnan(source.advantages)]
        found["advantages"]["negative_frac"] = float((known < 0).mean())
    return found


def check_labels(data: DataSection, objective: BoundObjective, source: GroupSource) -> None:
    """Whether these rows can teach anything, and what is odd about them; nothing has to be loaded for it.

    Warns of negative rewards as weights, and of a target reward that no training prompt comes near.
    Raises: DataError as `build_draw` does.
    """
    pushes = row_gradients(objective, source)
    draw = _draw(data.sampling, objective, source, pushes)
    _warn_of_pushing_down(objective, pushes if draw is None else pushes[draw.rows])
    warn_of_target(data, objective, source)


def warn_of_target(data: DataSection, objective: BoundObjective, source: GroupSource) -> None:
    """Warns of a target reward that no training prompt comes near, with the range there is."""
    condition = SampleNeeds.of(objective.needs, data).condition
    if condition is None:
        return
    problem = target_problem(
        condition.target, float(np.nanmin(source.rewards)), float(np.nanmax(source.rewards))
    )
    if problem is not None:
        logger.warning("data.condition.target: %s", problem)


def _column(values: np.ndarray) -> torch.Tensor | None:
    return None if np.isnan(values).all() else torch.from_numpy(values).float()


def _nothing_learnt(objective: BoundObjective, source: GroupSource) -> str:
    by_advantage = Need.ADVANTAGES in objective.needs
    labels = source.advantages if by_advantage else source.rewards
    what, needed = ("advantage", "above 0") if by_advantage else ("reward", "enough for a weight")
    settings = ", ".join(f"{key} = {value}" for key, value in objective.params.items())
    return (
        f"objective '{objective.spec.name}'{f' with {settings}' if settings else ''}: learns from none of "
        f"{len(source)} training rows, since no {what} is {needed} (the highest: {_highest(source, labels)})"
    )


def _highest(source: GroupSource, labels: np.ndarray) -> str:
    if np.isnan(labels).all():
        return "there is none"
    row = int(np.nanargmax(labels))
    return f"{labels[row]:g}, row {source.group(row).id}"


def _warn_of_pushing_down(objective: BoundObjective, pushes: np.ndarray) -> None:
    """Rewards are weights here, and a negative weight makes a response less likely, without end."""
    down = int((pushes < 0).sum())
    if down and Need.ADVANTAGES not in objective.needs:
        logger.warning(
            "objective '%s': %d of %d training rows have a negative reward, and so a loss without a lower "
            "bound; data.normalize_rewards: sigmoid takes rewards into (0, 1)",
            objective.spec.name, down, len(pushes),
        )  # fmt: skip
