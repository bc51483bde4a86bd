"""Who makes the shards of `map` stages: this process, processes of this machine, or a Ray cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Annotated, Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from data_pipelines.base import StageSettings
from data_pipelines.shard_work import Job, Made, Order, ShardWorker
from prefopt.errors import DataError
from prefopt.recipe.section import ByName, NonNegativeFloat, Section

logger = logging.getLogger("prefopt.data")


class ExecutorSection(Section):
    """Who makes the shards of `map` stages. A `whole` stage is always one pass, in the process of the command."""

    name: str
    max_retries: Annotated[int, Field(ge=0)] = 2
    """Times a shard is made again whose worker died (out of memory, a machine lost) before the build stops."""


class LocalExecutor(ExecutorSection):
    """This machine."""

    name: Literal["local"] = "local"
    workers: PositiveInt = 1
    """Processes that share the shards, each with models of its own. With 1 it is the process of the command."""


class RayExecutor(ExecutorSection):
    """A Ray cluster that runs already; `output_dir`, models and plugins lie where all its machines see them."""

    name: Literal["ray"] = "ray"
    address: str
    """host:port of its head, or `auto` on one of its machines."""
    workers: PositiveInt | None = None
    """Most shards at once; default: as many as the cluster has room for."""
    num_cpus: PositiveFloat = 1.0
    """Cores set aside for each shard at work, or for each worker that keeps a model."""
    num_gpus: NonNegativeFloat | None = None
    """GPUs of each. Default: what the stage's settings ask for (`engine.tensor_parallel_size`, 1 for a reward
    model), and none on a cluster without GPUs."""


AnyExecutor = Annotated[LocalExecutor | RayExecutor, ByName()]


class Executor(Protocol):
    """Makes shards, wherever."""

    def make(
        self, order: Order, settings: StageSettings, jobs: Sequence[Job]
    ) -> Generator[Made, None, None]:
        """The shards in whatever order they are done. Raises: DataError for a shard whose workers died once too
        often; whatever the stage raises."""
        ...

    def close(self) -> None:
        """Leaves what it is connected to. May be called twice."""
        ...


class ThisProcess:
    """No other process: shard after shard."""

    def make(
        self, order: Order, settings: StageSettings, jobs: Sequence[Job]
    ) -> Generator[Made, None, None]:
        worker = ShardWorker(order, settings)
        try:
            for job in jobs:
                yield worker.make(job)
        finally:
            worker.close()

    def close(self) -> None:
        """Nothing to leave."""


class Retries:
    """Counts the workers that died on each shard of a stage.

    Args:
        stage: its id.
        most: deaths that a shard may outlive.
    """

    def __init__(self, stage: str, most: int) -> None:
        self.stage = stage
        self.most = most
        self._deaths: Counter[int] = Counter()

    def died(self, job: Job, why: str) -> None:
        """Raises: DataError if that was once too often."""
        self._deaths[job.number] += 1
        deaths = self._deaths[job.number]
        if deaths > self.most:
            raise DataError(
                f"stage {self.stage!r}, shard {job.number} ({job.source.path}): {deaths} workers died on it, more "
                f"than executor.max_retries = {self.most}; the last one: {why}. If memory ran out, set fewer "
                "executor.workers. The shards made so far are kept: run the same command again"
            )
        logger.warning(
            "%s: the worker of shard %d died (%s); the shard is made again",
            self.stage,
            job.number,
            why,
        )


def open_executor(section: ExecutorSection) -> Executor:
    """The executor of the settings, connected. Raises: ConfigError for a Ray that is not there."""
    if isinstance(section, RayExecutor):
        from data_pipelines.on_ray import RayCluster

        return RayCluster(section)
    assert isinstance(section, LocalExecutor)
    if section.workers == 1:
        return ThisProcess()
    from data_pipelines.local_workers import LocalWorkers

    return LocalWorkers(section)
