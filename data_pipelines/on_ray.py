"""A Ray cluster makes the shards: each a task, or the next one of an actor where the stage keeps a model.

Ray's own retries are off: a shard whose worker or machine is lost is sent again from here, and counted.
What a worker writes it leaves on storage that all machines share; only names and counts travel through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from data_pipelines.base import StageSettings
from data_pipelines.executors import RayExecutor, Retries
from data_pipelines.shard_work import Job, Made, Order, ShardWorker, ordered_settings
from prefopt.errors import ConfigError, DataError

_LOOK_S = 5.0
"""Seconds after which it is looked again what the cluster still has."""
_CONNECT_S = 10.0


class RayCluster:
    """A connection to a running cluster. Raises: ConfigError if Ray is not installed, or no cluster answers."""

    def __init__(self, section: RayExecutor) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "executor.name = ray: ray is not installed here. Run: pip install 'prefopt[ray]' on every machine "
                "of the cluster"
            ) from error
        self.section = section
        self.ray: Any = ray
        _require_answer(section.address)
        try:
            ray.init(address=section.address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(_no_cluster(section.address, error)) from error

    def make(
        self, order: Order, settings: StageSettings, jobs: Sequence[Job]
    ) -> Generator[Made, None, None]:
        del settings  # each worker makes its own
        retries = Retries(order.place.id, self.section.max_retries)
        crew = _Crew(self.ray, self.section, order)
        waiting, flying = deque(jobs), dict[Any, Job]()
        try:
            while waiting or flying:
                room = crew.room()
                while waiting and len(flying) < room:
                    job = waiting.popleft()
                    flying[crew.send(job)] = job
                crew.release(room if waiting else len(flying))
                ready, _ = self.ray.wait(list(flying), timeout=_LOOK_S)
                for sent in ready:
                    job = flying.pop(sent)
                    made = crew.collect(sent)
                    if isinstance(made, Made):
                        yield made
                    else:
                        retries.died(job, made)
                        waiting.appendleft(job)
            crew.finish()
        finally:
            crew.kill()

    def close(self) -> None:
        self.ray.shutdown()


class _Crew:
    """The tasks or actors of one stage."""

    def __init__(self, ray: Any, section: RayExecutor, order: Order) -> None:
        self.ray = ray
        self.section = section
        self.order = order
        self.stored = ray.put(order)
        self.needs = {"num_cpus": section.num_cpus, "num_gpus": self._gpus()}
        self.idle: list[Any] = []
        self.busy: dict[Any, Any] = {}
        """Actors by what was asked of them."""

    def _gpus(self) -> float:
        if self.section.num_gpus is not None:
            return self.section.num_gpus
        return self.order.needs.num_gpus if self.ray.cluster_resources().get("GPU") else 0

    def room(self) -> int:
        """Shards the cluster can have at work at once. Raises: DataError if no machine of it can have one."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.needs["num_cpus"], "GPU": self.needs["num_gpus"]}
        fits = sum(
            min(int(node.get(kind, 0) // most) for kind, most in wanted.items() if most)
            for node in nodes
        )
        if fits == 0:
            raise DataError(
                f"stage {self.order.place.id!r}: no machine of the Ray cluster has {wanted['CPU']:g} cores and "
                f"{wanted['GPU']:g} GPUs for a worker. Lower executor.num_cpus or executor.num_gpus, or add one"
            )
        return min(fits, self.section.workers or fits)

    def send(self, job: Job) -> Any:
        """Has a shard made; returns what `collect` takes."""
        if not self.order.needs.stays:
            once = self.ray.remote(_make_once).options(max_retries=0, **self.needs)
            return once.remote(self.stored, os.getcwd(), job)
        actor = self.idle.pop() if self.idle else self._actor()
        sent = actor.make.remote(job)
        self.busy[sent] = actor
        return sent

    def collect(self, sent: Any) -> Made | str:
        """The shard, or how its worker died. Raises: what its stage raised."""
        errors = self.ray.exceptions
        actor = self.busy.pop(sent, None)
        try:
            made = self.ray.get(sent)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            if actor is not None:  # where it may still be alive, nobody asks it again
                self.ray.kill(actor)
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if actor is not None:
            self.idle.append(actor)
        return made

    def release(self, most: int) -> None:
        """Ends idle actors until there are ``most`` of any kind, or none is idle.

        An actor keeps its cores for life. Where a machine was lost, a new one may wait for those of an idle one,
        and for ever: nobody is asked for more shards than the cluster now has room for.
        """
        while self.idle and len(self.idle) + len(self.busy) > most:
            self.ray.kill(self.idle.pop())

    def finish(self) -> None:
        """Has the actors free what they hold; one that is lost by now holds nothing."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get([actor.close.remote() for actor in self.idle])

    def kill(self) -> None:
        for actor in [*self.idle, *self.busy.values()]:
            self.ray.kill(actor)

    def _actor(self) -> Any:
        actor = self.ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **self.needs)
        return actor.remote(self.stored, os.getcwd())


class _Actor:
    """A stage's worker on a machine of the cluster."""

    def __init__(self, order: Order, directory: str) -> None:
        self.order = order
        self.directory = directory
        self._worker: ShardWorker | None = None

    def make(self, job: Job) -> Made:
        if self._worker is None:
            _enter(self.directory)
            self._worker = ShardWorker(self.order, ordered_settings(self.order))
        return self._worker.make(job)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def _make_once(order: Order, directory: str, job: Job) -> Made:
    worker = _Actor(order, directory)
    try:
        return worker.make(job)
    finally:
        worker.close()


def _enter(directory: str) -> None:
    """Relative paths of the pipeline are the command's."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise DataError(
            f"{socket.gethostname()}: has no folder {directory}, in which the command was started. Start it in "
            "one that all machines of the cluster see under one path"
        ) from error


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(_no_cluster(address, error)) from error


def _no_cluster(address: str, error: Exception) -> str:
    return (
        f"executor.address = {address!r}: no Ray cluster answers there ({str(error).splitlines()[0]}). Start one "
        "(`ray start --head`, then `ray start --address=HOST:6379` on the other machines), or name the right one"
    )
