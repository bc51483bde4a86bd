"""TRL's trainers with one addition: a loss that is not finite stops the run and names its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from prefopt.data.groups import GroupSource
from prefopt.errors import TrainingError


class _FiniteLoss:
    """Checks every loss, each forward: a period would let NaN weights into a checkpoint."""

    train_source: GroupSource
    eval_source: GroupSource | None

    def _send_telemetry(self) -> None:
        """Nothing: a run tells nobody about itself unless ``run.trackers`` says so (TRL pings its hub)."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        rows = inputs["row"]
        inputs = {name: value for name, value in inputs.items() if name != "row"}
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss: Tensor = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            raise TrainingError(self._explain(loss.item(), rows.tolist()))
        return result

    def _explain(self, loss: float, rows: list[int]) -> str:
        is_training = self.model.training  # type: ignore[attr-defined]
        source = self.train_source if is_training else self.eval_source
        assert source is not None  # evaluation had a source to take the batch from
        ids = [source.group(row).id for row in rows]
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        return (
            f"step {step}: the {'' if is_training else 'eval '}loss is {loss}. Rows of this forward: "
            f"{', '.join(ids[:16])}{' …' if len(ids) > 16 else ''}. Look at them with `prefopt show`; with "
            "fp16 use bf16, else lower train.learning_rate"
        )


class StageSFTTrainer(_FiniteLoss, SFTTrainer):
    """`trl.SFTTrainer` that names the rows of a non-finite loss."""


class StageRewardTrainer(_FiniteLoss, RewardTrainer):
    """`trl.RewardTrainer` that names the rows of a non-finite loss."""
