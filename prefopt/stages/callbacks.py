"""What any run of this project does, as callbacks for TRL's trainers: metrics.jsonl, saves, Ctrl-C."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from prefopt.errors import TrainingError
from prefopt.model.distributed import Interrupts
from prefopt.training.metrics import MetricsLog, peak_memory_gib

# Names of TRL and transformers -> the names of this project's metrics table.
METRIC_NAMES = {
    "loss": "loss/total",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "entropy": "train/entropy",
    "mean_token_accuracy": "train/token_accuracy",
    "num_tokens": "tokens/seen",
    "accuracy": "rewards/accuracy",
    "margin": "rewards/margin",
    "mean_reward": "rewards/mean",
    "min_reward": "rewards/min",
    "max_reward": "rewards/max",
}


class MetricsCallback(TrainerCallback):
    """Appends every logged row to ``metrics.jsonl`` and stops the run on a value that is not finite."""

    def __init__(self, log: MetricsLog, *, overflow_is_normal: bool) -> None:
        self.log = log
        self.overflow_is_normal = overflow_is_normal
        """fp16: the loss scaler meets infinite gradients on purpose and skips those steps."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Runs on every process; writes on the main one."""
        row = project_names(logs or {})
        norm = row.get("train/grad_norm", 0.0)
        if not math.isfinite(norm) and not self.overflow_is_normal:
            raise TrainingError(
                f"step {state.global_step}: the gradient norm is {norm}; lower train.learning_rate, or look "
                "at the data with `prefopt show`"
            )
        if not row or not state.is_world_process_zero:
            return
        if "loss/total" in row:
            row["memory/peak_gib"] = peak_memory_gib(args.device)
        self.log.append({"step": state.global_step, **row})


class RunCallback(TrainerCallback):
    """Logs, evaluates and saves at the last step whatever the periods are; saves and stops on Ctrl-C.

    Args:
        interrupts: entered around ``Trainer.train``.
        evaluate_last: evaluate after the last step (a period of its own does so already).
    """

    def __init__(self, interrupts: Interrupts, *, evaluate_last: bool) -> None:
        self.interrupts = interrupts
        self.evaluate_last = evaluate_last
        self.interrupted = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        if is_last:
            control.should_log = control.should_save = True
            control.should_evaluate = control.should_evaluate or self.evaluate_last
        elif self.interrupts.requested():
            self.interrupted = True
            control.should_save = control.should_training_stop = True
        return control


class QuietProgress(ProgressCallback):
    """The progress bar with the loss behind it, instead of one printed line for every logged step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{(logs or {})['loss']:.3g}")


def project_names(logs: dict[str, Any]) -> dict[str, float]:
    """``logs`` under this project's names: ``eval_x`` as ``eval/…``, an unknown ``x`` as ``trl/x``.

    The summary transformers logs when training ends (``train_runtime`` …) is left out: it is not a step.
    """
    if "train_runtime" in logs:
        return {}
    is_eval = any(key.startswith("eval_") for key in logs)
    row: dict[str, float] = {}
    for key, value in logs.items():
        name = key.removeprefix("eval_")
        if name.endswith("_per_second"):
            continue
        name = "time/eval_s" if name == "runtime" else METRIC_NAMES.get(name, f"trl/{name}")
        if is_eval and key.startswith("eval_") and not name.startswith("time/"):
            name = f"eval/{name.removeprefix('train/')}"
        row[name] = float(value)
    return row
