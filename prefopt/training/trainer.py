"""The one trainer: a regime gives windows, the model log-probs, the objective losses; here they are reduced.

    loss = Σ losses / pairs of the global batch + Σ token_losses / chosen tokens of the global batch
         + Σ sample_losses / samples of the global batch + Σ sample_token_losses / their tokens

All denominators come from the window and not from the micro-batch, so any split of one global batch over
processes, accumulation steps and micro-batches gives the same gradient.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from prefopt.data.groups import GroupSource
from prefopt.errors import PrefoptError, TrainingError
from prefopt.model.distributed import Interrupts, clip_gradients, max_over_processes, sync_gradients
from prefopt.model.layouts import log_ratio_tolerance
from prefopt.model.micro_batches import SplitLimits
from prefopt.model.sweep import LayoutFn, sweep
from prefopt.recipe.registry import BoundObjective
from prefopt.recipe.schema import TrainSection
from prefopt.reference.base import Reference
from prefopt.report.progress import Bar
from prefopt.training.batch_metrics import add_batch_metrics, add_layout_metrics, derived
from prefopt.training.best import Best
from prefopt.training.checkpoint import Checkpoints
from prefopt.training.generation_probe import GenerationProbe
from prefopt.training.held_out import held_out_metrics
from prefopt.training.importance import weighted
from prefopt.training.inputs import response_logps, response_scores
from prefopt.training.metrics import MeanMeter, MetricsLog, peak_memory_gib
from prefopt.training.optimizer import learning_rate, set_learning_rate
from prefopt.training.reduction import PolicyGap, name_culprits, reduced
from prefopt.training.regimes import Regime
from prefopt.training.windows import MicroBatch, Window
from prefopt.types import Group, ObjectiveOutput, ResponseLogps, ResponseScores

logger = logging.getLogger(__name__)

# An fp16 loss scale that halves this often in a row is not searching, it is overflowing.
_MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class TrainResult:
    """How a call of `PreferenceTrainer.train` ended."""

    step: int
    """Optimizer steps done."""
    finished: bool
    """False if it was interrupted (and saved) before the last step."""
    final_step: int
    """The step whose weights are the result: the last, or the best one where the recipe says so."""


class PreferenceTrainer:
    """Trains a policy or a reward model on the windows of a regime with one objective.

    Args:
        model: the prepared (wrapped) `LogpModel` or `ScoreModel`.
        optimizer: the prepared optimizer.
        objective: the objective with its hyper-parameters.
        regime: where windows come from.
        settings: the recipe's ``train`` section.
        accelerator: created by the launcher's configuration.
        run_dir: where metrics and checkpoints go.
        limits: size of one forward.
        reference: where reference log-probs come from, or None for an objective that needs none.
        eval_source: held-out groups, or None.
        importance_cap: weight samples by their truncated importance; None: do not.
        eval_every: steps between evaluations; None: before the first step and after the last.
        probe: what the policy answers at every evaluation, or None.
        best: follows one metric, keeps its best checkpoint and may stop the run, or None.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        objective: BoundObjective,
        regime: Regime,
        settings: TrainSection,
        accelerator: Accelerator,
        run_dir: Path,
        limits: SplitLimits,
        reference: Reference | None = None,
        eval_source: GroupSource | None = None,
        importance_cap: float | None = None,
        eval_every: int | None = None,
        probe: GenerationProbe | None = None,
        best: Best | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.regime = regime
        self.settings = settings
        self.accelerator = accelerator
        self.limits = limits
        self.reference = reference
        self.eval_source = eval_source
        self.importance_cap = importance_cap
        self.eval_every = eval_every
        self.probe = probe
        self.best = best
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints", accelerator, keep=settings.keep_checkpoints
        )
        self._layout: LayoutFn = cast(Any, accelerator.unwrap_model(model)).layout
        self._reads_scores = objective.reads_scores
        self._meter = MeanMeter(accelerator.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clock = time.perf_counter()
        self._open_window_s = 0.0
        self._skipped = 0
        self._policy_gap = PolicyGap()

    def train(self, resume_from: Path | None = None) -> TrainResult:
        """Runs to the last step, or to an interrupt, after which a checkpoint says where to go on.

        Raises: TrainingError for a non-finite loss or gradient (naming the rows), a reference that is
            not the policy at step 0, or a file of the run that cannot be written.
        """
        if resume_from is not None:
            self.restore(resume_from)
        self._start()
        total = self.regime.num_steps
        interrupts = Interrupts(self.accelerator)
        hidden = not self.accelerator.is_main_process
        with (
            Bar(total=total, initial=self.regime.step, disable=hidden, unit="step") as bar,
            interrupts,
        ):
            while self.regime.step < total and not self._stopped:
                window = self._next_window()
                self._step(window)
                self._after_step(window.step + 1, bar)
                if interrupts.requested():
                    self._save(window.step + 1)
                    return TrainResult(window.step + 1, False, window.step + 1)
        if self.checkpoints.newest_step() != self.regime.step:
            self._save(self.regime.step)
        return TrainResult(self.regime.step, True, self._take_best())

    @property
    def _stopped(self) -> bool:
        return self.best is not None and self.best.stopped

    def _take_best(self) -> int:
        """Puts the weights of the best step in place, if that is what the recipe wants; the step they are of."""
        if self.best is None:
            return self.regime.step
        step = self.best.result_step(self.regime.step, self.regime.num_steps)
        if step != self.regime.step:
            path = self.checkpoints.path_of(step)
            self.checkpoints.load(self.checkpoints.intact(path, step_back=False))
        return step

    def close(self) -> None:
        """Stops whatever feeds the trainer: engines, their processes, signals."""
        self.regime.close()
        if self.probe is not None:
            self.probe.close()

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint: weights, optimizer, random states, position, the open logging window.

        Raises: ConfigError if it is of other weights, data or processes; TrainingError if it is damaged.
        """
        state = self.checkpoints.load(path)
        self.regime.load_state_dict(state["regime"])
        if self.reference is not None:
            self.reference.load_state(self.checkpoints.load_tensors(path))
        self._meter.load_state_dict(state["metrics"], self.accelerator)
        self._open_window_s = state["open_window_s"]
        if self.probe is not None:
            self.probe.load_state_dict(state.get("generation_probe", {}))
        if self.best is not None:
            self.best.load_state_dict(state.get("best", {}))
            self.checkpoints.kept_step = self.best.step
        logger.info("resumed from %s (step %d)", path, self.regime.step)

    def evaluate(self, step: int) -> dict[str, float]:
        """What there is to measure at ``step``: means over the held-out groups, the probe's answers."""
        row = {}
        if self.eval_source is not None:
            forwards = partial(self._held_out_forwards, self.eval_source)
            row = held_out_metrics(self.eval_source, forwards, self.accelerator)
        return row if self.probe is None else row | self.probe.measure(step)

    def _held_out_forwards(
        self, source: GroupSource, rows: Sequence[int]
    ) -> Iterator[tuple[ResponseLogps | ResponseScores, ObjectiveOutput]]:
        """What the objective sees and says of this process's share of ``rows``."""
        batches = sweep(
            self.model, source, rows, self.limits, self.accelerator,
            layout=self._layout, what="eval",
        )  # fmt: skip
        for groups, output, counts in batches:
            (reference,) = self._reference_logps([groups])
            seen = self._seen(groups, output, reference, counts=counts)
            yield seen, self.objective(seen)

    def _start(self) -> None:
        self.model.train()
        if self.accelerator.is_main_process:
            self.log.rewind(self.regime.step)
        if self.regime.step == 0 and (row := self.evaluate(0)):
            self._write({"step": 0, **row})
            if self.best is not None:
                self.best.check_start(row)
        self._clock = time.perf_counter() - self._open_window_s

    def _next_window(self) -> Window:
        """The next window; if its engine or signal gave up, what has been trained is saved first."""
        try:
            return self.regime.next()
        except PrefoptError:
            # Raised on every process or none (`RolloutRegime` sees to it), so all save together.
            if self.regime.step > 0 and self.checkpoints.newest_step() != self.regime.step:
                self._save(self.regime.step)
            raise

    def _reference_logps(
        self, batches: Sequence[Sequence[Group]], version: int | None = None
    ) -> Sequence[Tensor | None]:
        """(R, T) of every micro-batch, or None for an objective that needs none."""
        if self.reference is None:
            return [None] * len(batches)
        return self.reference.logps(batches, version)

    def _check_reference(self, groups: Sequence[Group], reference: Tensor | None) -> None:
        """At step 0 the policy is its own initial reference; anything else is a wrong reference."""
        if self.reference is None or not self.reference.is_initial_policy:
            return
        self.model.eval()
        with torch.no_grad():
            layout = self._layout(groups).to(self.accelerator.device)
            policy = self.model(layout).float()
            lp = response_logps(groups, policy, reference, counts=True)
        self.model.train()
        gap = (lp.log_ratio.abs().sum() / lp.mask.sum()).item()
        limit = log_ratio_tolerance(self.model, self.settings.precision)
        if not gap <= limit:
            raise TrainingError(
                f"the policy is not its own reference at step 0: mean |log-ratio| {gap:.3g} nats a token "
                f"(limit {limit:g}); the reference log-probs are not of these weights "
                f"({self.reference.where})"
            )

    def _step(self, window: Window) -> None:
        started = time.perf_counter()
        batches = [batch.groups for batch in window.micro_batches]
        references = self._reference_logps(batches, window.version)
        if window.step == 0:
            self._check_reference(batches[0], references[0])
        rate = learning_rate(self.settings, window.step, self.regime.num_steps)
        set_learning_rate(self.optimizer, rate)  # before backward: DeepSpeed steps inside it
        last = len(window.micro_batches) - 1
        for index, micro_batch in enumerate(window.micro_batches):
            with sync_gradients(self.accelerator, self.model, index == last):
                loss = self._micro_batch_loss(micro_batch, references[index], window)
                # Wrappers average gradients over processes; the loss is already a global mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
        self._policy_gap.check(window)
        norm = clip_gradients(self.accelerator, self._parameters, self.settings.max_grad_norm)
        taken = self._check_gradient(norm, window)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.reference is not None:
            self.reference.after_step()
        for name, (total, count) in window.metrics.items():
            self._meter.add(name, total, count)
        self._meter.add("train/grad_norm", norm if taken else 0.0, float(taken))
        if self.settings.precision == "fp16":
            self._meter.add_total("train/skipped_steps", float(not taken))
        self._meter.add("loss/total", 0.0, float(self.accelerator.is_main_process))
        self._meter.add("train/epoch", window.epoch, 1.0)
        self._meter.add("train/learning_rate", rate, 1.0)
        self._meter.add("time/train_s", time.perf_counter() - started, 1.0)

    def _micro_batch_loss(
        self, micro_batch: MicroBatch, reference: Tensor | None, window: Window
    ) -> Tensor:
        layout = self._layout(micro_batch.groups)
        add_layout_metrics(self._meter, micro_batch.groups, layout, counts=micro_batch.counts)
        forward = self.model(layout.to(self.accelerator.device)).float()
        seen = self._seen(micro_batch.groups, forward, reference, counts=micro_batch.counts)
        output = self.objective(seen)
        if isinstance(seen, ResponseLogps):
            if self.importance_cap is not None:
                output, weights = weighted(output, seen, self.importance_cap)
                output = replace(
                    output, sample_metrics={**output.sample_metrics, "rollout/importance": weights}
                )
            self._policy_gap.add(seen, window)
        loss = reduced(output, window)
        if not torch.isfinite(loss):
            raise TrainingError(name_culprits(micro_batch.groups, forward, output, window.step))
        add_batch_metrics(self._meter, seen, output)
        # The very number that is minimised: summed over micro-batches and ranks, counted once a window.
        self._meter.add("loss/total", loss, 0.0)
        # With nothing to learn from here, run backward through everything with the others all the same.
        return loss if micro_batch.counts and loss.requires_grad else loss + forward.sum() * 0.0

    def _seen(
        self, groups: Sequence[Group], output: Tensor, reference: Tensor | None, *, counts: bool
    ) -> ResponseLogps | ResponseScores:
        """What the objective sees of a forward over ``groups``."""
        if self._reads_scores:
            return response_scores(groups, output, counts=counts)
        return response_logps(groups, output, reference, counts=counts)

    def _check_gradient(self, norm: Tensor | float, window: Window) -> bool:
        """Will this step be taken? False where the fp16 loss scaler skips it; TrainingError otherwise."""
        if torch.isfinite(torch.as_tensor(norm)):
            self._skipped = 0
            return True
        ids = [group.id for batch in window.micro_batches for group in batch.groups]
        if self.settings.precision == "fp16" and self._skipped < _MAX_SKIPPED_STEPS:
            self._skipped += 1  # the loss scaler skips this step and halves its scale
            return False
        hint = (
            "fp16 overflows; set train.precision = bf16"
            if self.settings.precision == "fp16"
            else "lower train.learning_rate or look at these rows with `prefopt show`"
        )
        raise TrainingError(
            f"step {window.step + 1}: the gradient norm is {float(norm)}; {hint}. Rows of this step on this "
            f"process: {', '.join(ids[:16])}{' …' if len(ids) > 16 else ''}"
        )

    def _after_step(self, step: int, bar: Bar) -> None:
        settings, total = self.settings, self.regime.num_steps
        row: dict[str, Any] = {}
        if step % settings.log_every == 0 or step == total:
            row = self._reduced_row()
            bar.set_postfix({k.split("/")[-1]: f"{row[k]:.3g}" for k in _SHOWN if k in row})
        bar.update(1)
        due = step == total if self.eval_every is None else step % self.eval_every == 0
        if due:
            started = time.perf_counter()
            row |= self.evaluate(step)
            self._clock += time.perf_counter() - started  # not counted as training time
        if row:
            self._write({"step": step, **row})
        is_best = self.best is not None and bool(row) and self.best.consider(row, step)
        if is_best:
            self.checkpoints.kept_step = step
        if is_best or (settings.save_every and step % settings.save_every == 0):
            self._save(step)

    def _reduced_row(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = derived(self._meter.reduce(self.accelerator))
        row["time/window_s"] = seconds
        row["tokens/per_s"] = row["tokens/computed"] / seconds
        peak = peak_memory_gib(self.accelerator.device)
        row["memory/peak_gib"] = max_over_processes(self.accelerator, peak)
        return row

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.log.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        state = {
            "regime": self.regime.state_dict(),
            "num_processes": self.accelerator.num_processes,
            # A checkpoint may fall between two rows of metrics.jsonl: the next row is of the whole window.
            "metrics": self._meter.state_dict(self.accelerator),
            "open_window_s": started - self._clock,
        }
        if self.probe is not None:
            state["generation_probe"] = self.probe.state_dict()
        if self.best is not None:
            state["best"] = self.best.state_dict()
        tensors = {} if self.reference is None else self.reference.state()
        self.checkpoints.save(step, state, tensors)
        self._clock += time.perf_counter() - started


_SHOWN = ("loss/total", "rewards/accuracy", "rewards/margin", "rollout/reward")
