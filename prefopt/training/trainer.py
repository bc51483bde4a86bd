"""The one trainer: a regime gives windows, the model log-probs, the objective losses; here they are reduced.

    loss = Σ losses / pairs of the global batch + Σ token_losses / chosen tokens of the global batch
         + Σ sample_losses / samples of the global batch + Σ sample_token_losses / their tokens
         + the balancing loss of a mixture of experts, which is one of each forward (`prefopt.model.balance`)

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
from prefopt.errors import TrainingError
from prefopt.model.distributed import clip_gradients, sync_gradients
from prefopt.model.memory import OPTIMIZER_REMEDY, memory_for, memory_for_state
from prefopt.model.micro_batches import SplitLimits
from prefopt.model.sweep import LayoutFn, sweep
from prefopt.process.progress import progress
from prefopt.process.stopping import Stopped, stopping
from prefopt.recipe.registry import BoundObjective
from prefopt.recipe.schema import TrainSection
from prefopt.reference.base import Reference
from prefopt.report.bars import Bar
from prefopt.training.batch_metrics import add_batch_metrics, add_layout_metrics, window_row
from prefopt.training.best import Best
from prefopt.training.boundary import Boundary
from prefopt.training.checkpoint import Checkpoints
from prefopt.training.generation_probe import GenerationProbe
from prefopt.training.gradients import GradientWatch
from prefopt.training.held_out import held_out_metrics
from prefopt.training.importance import weighted
from prefopt.training.inputs import check_initial, response_logps, response_scores, split_forward
from prefopt.training.interrupts import Interrupts
from prefopt.training.keeper import Keeper
from prefopt.training.metrics import MeanMeter, MetricsLog
from prefopt.training.optimizer import learning_rate, set_learning_rate
from prefopt.training.reduction import PolicyGap, name_culprits, reduced
from prefopt.training.regimes import Regime
from prefopt.training.windows import MicroBatch, Window
from prefopt.types import Group, ObjectiveOutput, ResponseLogps, ResponseScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a call of `PreferenceTrainer.train` ended."""

    step: int
    """Optimizer steps done."""
    finished: bool
    """False if it was interrupted (and saved) before the last step."""
    final_step: int
    """The step whose weights are the result: the last, or the best one where the recipe says so."""
    signal: int | None = None
    """What interrupted it."""


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
        router = cast(Any, accelerator.unwrap_model(model)).balance
        self._balance_weight: float = 0.0 if router is None else router.coefficient
        self._meter = MeanMeter(accelerator.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clock = time.perf_counter()
        self._open_window_s = 0.0
        self._updated = False
        self._interrupts = Interrupts(accelerator)
        self.keeper = Keeper(
            self.checkpoints, accelerator, regime, self._meter, reference, probe, best
        )
        self._policy_gap = PolicyGap()
        self._gradient = GradientWatch(
            model, accelerator, precision=settings.precision, num_steps=regime.num_steps
        )

    def train(self, resume_from: Path | None = None) -> TrainResult:
        """Runs to the last step, or to an interrupt, after which a checkpoint says where to go on.

        Raises: TrainingError for a non-finite loss or gradient (naming the rows), a reference that is
            not the policy at step 0, or a file of the run that cannot be written.
        """
        if resume_from is not None:
            self.restore(resume_from)
        self._start()
        total = self.regime.num_steps
        hidden = not self.accelerator.is_main_process
        bar = Bar(total=total, initial=self.regime.step, disable=hidden, unit="step")
        with bar, self._interrupts:
            while self.regime.step < total and not self._stopped:
                number, step = self._advance(bar), self.regime.step
                if number is not None:
                    return TrainResult(step, False, step, signal=number)
        if self.keeper.saved != self.regime.step:
            self._save(self.regime.step)
        return TrainResult(self.regime.step, True, self._take_best())

    def _advance(self, bar: Bar) -> int | None:
        """One optimizer step and what follows it, or the signal after which all was saved instead."""
        boundary = Boundary.here(self.regime.step, self._meter)
        progress.enter(f"preparing step {boundary.step + 1}")
        try:
            window = self.regime.next()
            self._step(window)
        except (Exception, Stopped) as error:
            if not self._updated and self.keeper.can_go_back(error):
                self.optimizer.zero_grad()
                self.keeper.go_back(boundary, time.perf_counter() - self._clock)
                if isinstance(error, Stopped):
                    return error.number
            raise
        try:
            self._after_step(window.step + 1, bar)
            self._interrupts.check()
        except Stopped as stopped:
            if stopped.at_once:
                raise
            if self.keeper.saved != window.step + 1:
                self._save(window.step + 1)
            return stopped.number
        return None

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
        self._open_window_s = self.keeper.restore(path)["open_window_s"]

    def evaluate(self, step: int) -> dict[str, float]:
        """What there is to measure at ``step``: means over the held-out groups, the probe's answers."""
        patience = None if self.probe is None else self.probe.parts.timeout_s
        progress.enter(f"evaluating at step {step}", at_most_s=patience)
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
            if stopping.is_deferred:
                self._interrupts.check_between_forwards()

    def _start(self) -> None:
        self.model.train()
        if self.accelerator.is_main_process:
            # A row without its evaluation is not there yet, nor is one that a resumed run has made of it.
            self.log.rewind(self.regime.step - (self.keeper.open_row is not None))
        if self.keeper.open_row is not None:
            row, self.keeper.open_row = self.keeper.open_row, None
            self._log_row(self.regime.step, row | self.evaluate(self.regime.step))
        elif self.regime.step == 0 and (row := self.evaluate(0)):
            self._write({"step": 0, **row})
            if self.best is not None:
                self.best.check_start(row)
        self._clock = time.perf_counter() - self._open_window_s

    def _reference_logps(
        self, batches: Sequence[Sequence[Group]], version: int | None = None
    ) -> Sequence[Tensor | None]:
        """(R, T) of every micro-batch, or None for an objective that needs none."""
        if self.reference is None:
            return [None] * len(batches)
        return self.reference.logps(batches, version)

    def _step(self, window: Window) -> None:
        started = time.perf_counter()
        self._updated = False
        progress.enter(f"training step {window.step + 1}")
        batches = [batch.groups for batch in window.micro_batches]
        references = self._reference_logps(batches, window.version)
        if window.step == 0 and self.reference is not None:
            check_initial(
                self.model, self._layout(batches[0]).to(self.accelerator.device), batches[0],
                references[0], self.reference, self.settings.precision,
            )  # fmt: skip
        rate = learning_rate(self.settings, window.step, self.regime.num_steps)
        set_learning_rate(self.optimizer, rate)  # before backward: DeepSpeed steps inside it
        last = len(window.micro_batches) - 1
        what, checkpointing = f"in step {window.step + 1}", self.settings.gradient_checkpointing
        for index, micro_batch in enumerate(window.micro_batches):
            progress.tick(f"micro-batch {index + 1} of {last + 1}")
            if index:  # a whole step may take longer than there is time
                self._interrupts.check_between_forwards()
            with (
                memory_for(what, micro_batch.groups, self.limits, backward=checkpointing),
                sync_gradients(self.accelerator, self.model, index == last),
            ):
                loss = self._micro_batch_loss(micro_batch, references[index], window)
                # Wrappers average gradients over processes; the loss is already a global mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
        self._policy_gap.check(window)
        norm = clip_gradients(self.accelerator, self._parameters, self.settings.max_grad_norm)
        taken = self._gradient.will_step(norm, rate, window)
        self._updated = True
        progress.tick("the optimizer's update")
        with memory_for_state(f"in the update of step {window.step + 1}", OPTIMIZER_REMEDY):
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.reference is not None:
            self.reference.after_step()
        for name, (total, count) in window.metrics.items():
            self._meter.add(name, total, count)
        known = norm if taken and norm is not None else None
        self._meter.add(
            "train/grad_norm", 0.0 if known is None else known, float(known is not None)
        )
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
        forward, balance = split_forward(self.model(layout.to(self.accelerator.device)))
        self._gradient.listen(forward)
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
        reaches_all = micro_batch.counts and loss.requires_grad  # the routers' loss alone does not
        loss = loss if balance is None else loss + self._balance(balance, micro_batch, window)
        if not torch.isfinite(loss):
            raise TrainingError(name_culprits(micro_batch.groups, forward, output, window.step))
        add_batch_metrics(self._meter, seen, output)
        # The very number that is minimised: summed over micro-batches and ranks, counted once a window.
        self._meter.add("loss/total", loss, 0.0)
        # With nothing to learn from here, run backward through everything with the others all the same.
        return loss if reaches_all else loss + forward.sum() * 0.0

    def _balance(self, loss: Tensor, micro_batch: MicroBatch, window: Window) -> Tensor:
        """The routers' part of a forward's loss: over a step, a mean over the tokens of all its forwards."""
        tokens = micro_batch.num_row_tokens
        self._meter.add("loss/router_balance", loss.detach() * tokens, tokens)
        return self._balance_weight * tokens / max(1, window.num_row_tokens) * loss

    def _seen(
        self, groups: Sequence[Group], output: Tensor, reference: Tensor | None, *, counts: bool
    ) -> ResponseLogps | ResponseScores:
        """What the objective sees of a forward over ``groups``."""
        if self._reads_scores:
            return response_scores(groups, output, counts=counts)
        return response_logps(groups, output, reference, counts=counts)

    def _after_step(self, step: int, bar: Bar) -> None:
        settings, total = self.settings, self.regime.num_steps
        row: dict[str, Any] = {}
        self._updated = False
        self.keeper.reached(step)
        if step % settings.log_every == 0 or step == total:
            row = self._reduced_row()
            bar.set_postfix({k.split("/")[-1]: f"{row[k]:.3g}" for k in _SHOWN if k in row})
        bar.update(1)
        if step == total if self.eval_every is None else step % self.eval_every == 0:
            started = time.perf_counter()
            try:
                row |= self.evaluate(step)
            except Stopped:
                self.keeper.open_row = row
                raise
            self._clock += time.perf_counter() - started  # not counted as training time
        is_best = bool(row) and self._log_row(step, row)
        if is_best or (settings.save_every and step % settings.save_every == 0):
            self._save(step)

    def _log_row(self, step: int, row: dict[str, Any]) -> bool:
        """Writes a row of metrics.jsonl; is it the best so far?"""
        self._write({"step": step, **row})
        is_best = self.best is not None and self.best.consider(row, step)
        if is_best:
            self.checkpoints.kept_step = step
        return is_best

    def _reduced_row(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return window_row(self._meter, self.accelerator, seconds)

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.log.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        self.keeper.save(step, started - self._clock)
        self._clock += time.perf_counter() - started


_SHOWN = ("loss/total", "rewards/accuracy", "rewards/margin", "rollout/reward")
