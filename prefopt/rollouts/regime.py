"""The regime of rollouts: pushes weights when due, keeps generation ahead by its lag, hands out windows.

One engine call an optimizer step. With ``max_lag = 0`` a step's batch is sampled when it is asked for; with
more, a worker thread samples later batches while the trainer trains, in an order that the schedule fixes, so
that the two differ in who waits and not in what is sampled.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from prefopt.data.groups import GroupList
from prefopt.engines.base import PolicyFiles
from prefopt.errors import ConfigError, SignalError, TrainingError
from prefopt.model.distributed import marked_on_all_ranks, together
from prefopt.model.micro_batches import SplitLimits, forward_tokens
from prefopt.process.progress import progress
from prefopt.rollouts.batch import RolloutBatch, merge
from prefopt.rollouts.experience import ExperienceLog
from prefopt.rollouts.plan import PromptPlan, Schedule
from prefopt.rollouts.probe import Probe
from prefopt.rollouts.publisher import PolicyPublisher
from prefopt.rollouts.sampler import Sampler
from prefopt.rollouts.statistics import rollout_metrics
from prefopt.rollouts.worker import Worker, wait
from prefopt.training.regimes import OfflineRegime
from prefopt.training.windows import Window, make_window
from prefopt.types import Group


@dataclass(frozen=True)
class RolloutLimits:
    """When a rollout is not trained on, and when a run stops for it."""

    max_failed_frac: float
    drop_lag_above: int | None = None
    max_policy_gap: float | None = None
    """Largest mean |policy - sampler| log-prob of a batch without lag, nats a token; None: not comparable."""
    timeout_s: float = 1800.0
    """Longest wait for one job of the engine."""
    longest_wait_s: float = 3600.0
    """Longest wait of a process for the rollouts of a step, whoever samples them."""


class RolloutRegime:
    """Windows of freshly sampled responses.

    Args:
        plan, schedule: which prompts, and which policy version, each step takes.
        sampler: makes batches; None on a process whose share another process samples.
        log: of this process; None where ``sampler`` is.
        publisher: writes versions; None where the engine shares the weights in training.
        probe: compares the engine with the trainer after a push.
        splits: size of one forward.
        limits: staleness and failures.
        num_steps: optimizer steps of the run.
        whole_groups: the objective couples the responses to a prompt: they stay in one forward.
        offline: pairs that every window also holds (HyPO).
        on_push: called with every version pushed (`live_reference`).
        keep_from: the oldest step that a checkpoint can still send the run back to.
    """

    tied_to_processes: ClassVar[str | None] = (
        "each process of a run with rollouts keeps a log of those that it samples, and goes on with what it finds "
        "there"
    )

    def __init__(
        self,
        *,
        plan: PromptPlan,
        schedule: Schedule,
        sampler: Sampler | None,
        log: ExperienceLog | None,
        publisher: PolicyPublisher | None,
        probe: Probe,
        accelerator: Accelerator,
        splits: SplitLimits,
        limits: RolloutLimits,
        num_steps: int,
        whole_groups: bool = False,
        offline: OfflineRegime | None = None,
        on_push: Callable[[int], None] | None = None,
        keep_from: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.plan = plan
        self.schedule = schedule
        self.sampler = sampler
        self.log = log
        self.publisher = publisher
        self.probe = probe
        self.accelerator = accelerator
        self.splits = splits
        self.limits = limits
        self.num_steps = num_steps
        self.whole_groups = whole_groups
        self.offline = offline
        self.on_push = on_push
        self.keep_from = keep_from
        self.step = 0
        self._worker = Worker(threaded=schedule.max_lag > 0)
        self._jobs: dict[int, Future[RolloutBatch]] = {}
        self._next_job = 0
        self._pushed: int | None = None

    def next(self) -> Window:
        """The window of the next optimizer step; StopIteration after the last.

        Raises (on every process, so that all can save): EngineError, SignalError, TrainingError.
        """
        if self.step >= self.num_steps:
            raise StopIteration
        step, begun = self.step, time.perf_counter()
        progress.enter(f"sampling for step {step + 1}", at_most_s=self.limits.longest_wait_s)
        self._submit(step, below=step)  # after a resume: what older versions still have to sample
        pushing = time.perf_counter()
        if self.schedule.pushes_at(step):
            self._push(step)
        sync_s = time.perf_counter() - pushing
        self._submit(step, below=step + 1)
        batch = self._take(step)
        # Without a lag the trainer waits for all of generating and scoring; with one, for what is left of it.
        timings = {"sync_s": sync_s, "wait_s": time.perf_counter() - begun - sync_s}
        self.step += 1
        return self._window(replace(batch, timings={**batch.timings, **timings}))

    def state_dict(self) -> dict[str, Any]:
        """The step, and a hash that tells whether it is the same run."""
        return {"step": self.step, "order": self.order_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the checkpoint's step; ConfigError if prompts, sampling or schedule changed since."""
        if state["order"] != self.order_hash:
            raise ConfigError(
                "the checkpoint was made with other prompts, another train.seed, or other regime settings: "
                "its position means nothing here. Restore them, or start afresh in another run.output_dir"
            )
        self.step = state["step"]

    @property
    def order_hash(self) -> str:
        """Hash of everything that decides which prompts a step samples, with which seeds and version."""
        return self._order_hash

    @functools.cached_property  # every checkpoint asks, and there may be many prompts
    def _order_hash(self) -> str:
        plan = self.plan
        ids = hashlib.sha256(repr([(p.id, p.ids, p.offline_ids) for p in plan.prompts]).encode())
        offline = None if self.offline is None else self.offline.order_hash
        numbers = (plan.seed, plan.per_step, plan.num_samples, plan.reset_frac, self.schedule)
        return hashlib.sha256(f"{ids.hexdigest()}:{numbers}:{offline}".encode()).hexdigest()

    def close(self) -> None:
        """Stops generating, and closes engine and signals."""
        self._worker.close()
        if self.sampler is not None:
            self.sampler.close()

    def _push(self, version: int) -> None:
        """Sends the weights of this moment to the engine. A collective."""
        # Prompts of a single token cannot be split into a context and what follows: nothing to compare.
        expected = self.probe.expected() if self.probe.sequences else None
        files = None if self.publisher is None else self.publisher.write(version)
        if self.publisher is not None:
            # The step before counts, too: until the new version is loaded, an engine that is restarted reads
            # the files of the one it had.
            oldest = [s for s in (self.keep_from(), self.step - 1) if s is not None]
            self.publisher.prune(self.schedule.version_of(min(oldest)))
        if self.on_push is not None:
            self.on_push(version)
        if self.sampler is not None:
            load = files or PolicyFiles(version, self.probe.nowhere, is_adapter=True)
            self._worker.submit(lambda: self._load(load, expected))
        self._pushed = version

    def _load(self, files: PolicyFiles, expected: Sequence[Sequence[float]] | None) -> None:
        assert self.sampler is not None
        self.sampler.engine.load_policy(files)
        if expected is not None:
            self.probe.check(self.sampler.engine, expected, files.version)

    def _submit(self, step: int, *, below: int) -> None:
        """Hands the worker the batches it may sample by now, of versions before ``below``, in order."""
        last = min(step + self.schedule.max_lag, self.num_steps - 1)
        for job in range(max(step, self._next_job), last + 1):
            version = self.schedule.version_of(job)
            if version >= below:
                return
            if self.sampler is not None and self.log is not None:
                if version != self._pushed and job not in self.log:
                    self._load_from_disk(version)
                self._jobs[job] = self._worker.submit(lambda job=job: self._make(job))
            self._next_job = job + 1

    def _load_from_disk(self, version: int) -> None:
        """After a resume: a version that was pushed before the checkpoint and still samples."""
        files = None if self.publisher is None else self.publisher.find(version)

        def load() -> None:
            if files is None:
                raise TrainingError(
                    f"the policy of step {version} samples the next batch, and is not in policies/ of the run "
                    "directory any more; resume from an earlier checkpoint (train.resume), or start afresh in "
                    "another run.output_dir"
                )
            # The trainer holds later weights: there is nothing to probe against.
            self._load(files, None)

        self._worker.submit(load)
        self._pushed = version

    def _make(self, step: int) -> RolloutBatch:
        """The batch of ``step``: as logged by an earlier life of the run, else sampled and logged now."""
        assert self.sampler is not None and self.log is not None
        logged = self.log.get(step)
        if logged is not None:
            self.probe.take()  # the batch keeps what was found when it was sampled
            return logged
        batch = self.sampler.make(step, self.schedule.version_of(step))
        batch = replace(batch, gap=self.probe.take())
        self.log.append(batch)
        return batch

    def _take(self, step: int) -> RolloutBatch:
        """The batch of ``step`` from every process; fails on all of them if it failed on one."""
        mine: RolloutBatch | None = None
        what = f"the rollouts of step {step + 1}"
        with together(self.accelerator, what):
            if self.sampler is not None:
                waiting = len(self._jobs) + 1  # pushes and batches ahead of it in the queue
                mine = wait(self._jobs.pop(step), self.limits.timeout_s * waiting, what)
        batches = [mine]
        if self.accelerator.num_processes > 1:
            batches = gather_object(batches)
        try:
            return self._checked(merge([batch for batch in batches if batch is not None]))
        except TrainingError as error:  # of what all processes have
            raise marked_on_all_ranks(error) from None

    def _checked(self, batch: RolloutBatch) -> RolloutBatch:
        lag, most = batch.step - batch.version, self.schedule.most_lag
        if most is not None and lag > most:
            raise TrainingError(
                f"step {batch.step}: its rollouts are {lag} steps old, the bound is {most}"
            )
        failed = [group for group in batch.groups if group.failed is not None]
        if len(failed) > self.limits.max_failed_frac * len(batch.groups):
            raise SignalError(
                f"step {batch.step + 1}: signals failed on {len(failed)} of {len(batch.groups)} groups "
                f"(regime.max_failed_frac = {self.limits.max_failed_frac:g}); the first, "
                f"{failed[0].prompt_id}: {failed[0].failed}"
            )
        return batch

    def _window(self, batch: RolloutBatch) -> Window:
        lag, limit = batch.step - batch.version, self.limits.drop_lag_above
        stale = limit is not None and lag > limit
        learning = [group for group in batch.groups if group.is_trained_on and not stale]
        groups = [part for g in learning for part in self._parts(g.trainable(batch.version))]
        if self.offline is not None:
            groups += [self.offline.source.group(row) for row in self.offline.rows(batch.step)]
        first = batch.groups[0].trainable(batch.version)
        return make_window(
            GroupList(groups),
            range(len(groups)),
            self.splits,
            step=batch.step,
            epoch=self.plan.epoch(batch.step),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            version=batch.version,
            max_policy_gap=self.limits.max_policy_gap if lag == 0 else None,
            # Nothing of it counts, but objectives look for what the others have: a score, an advantage.
            filler=replace(
                first, responses=(replace(first.responses[0], score=0.0, advantage=0.0),), pairs=()
            ),
            metrics=rollout_metrics(
                batch,
                stale=stale,
                counts=self.accelerator.is_main_process,
            ),
        )

    def _parts(self, group: Group) -> list[Group]:
        """The group, or, where no pair or baseline ties its responses together, pieces that fit a forward."""
        source = GroupList([group])
        if group.pairs or self.whole_groups or len(group.responses) == 1:
            return [group]
        if forward_tokens(source, 0, self.splits.packed) <= self.splits.max_tokens:
            return [group]
        half = len(group.responses) // 2
        pieces = (group.responses[:half], group.responses[half:])
        return [p for piece in pieces for p in self._parts(replace(group, responses=piece))]
