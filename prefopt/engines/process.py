"""An `HFEngine` in a process of its own, so that generation and training do not share one interpreter lock."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import errors
from prefopt.engines.base import Completion, PolicyFiles, Request, SamplingSpec
from prefopt.engines.child import clean_environment, describe_exit, kill_group, log_tail
from prefopt.engines.start import InTraining, Started, Task, engine
from prefopt.errors import EngineError
from prefopt.recipe.schema import HFSection, ModelSection, PeftSection

if TYPE_CHECKING:
    from prefopt.engines.hf import HFEngine

logger = logging.getLogger(__name__)

_POLL_S = 0.2
# A call's own deadline is the child's to keep and to explain; this is for a child that cannot.
_GRACE_S = 5.0


@dataclass(frozen=True)
class HFSource:
    """What the child loads: the policy as the trainer loads it, from the same two sections and seed."""

    model: ModelSection
    pad_id: int
    peft: PeftSection | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    """Dtype to compute in, where it is not the weights' own."""
    batch_size: int = 256
    timeout_s: float = 1800.0
    cpus: tuple[int, ...] = ()
    """Cores the child is bound to, and as many threads; empty: as this process."""

    def load(self) -> HFEngine:
        """The engine; imports torch."""
        import torch

        from prefopt.engines.hf import HFEngine

        if self.cpus:
            torch.set_num_threads(len(self.cpus))
        return HFEngine.load(
            self.model,
            self.peft,
            seed=self.seed,
            pad_id=self.pad_id,
            device=self.device,
            batch_size=self.batch_size,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            timeout_s=self.timeout_s,
        )


@engine("hf", source="transformers' generate")
def start_hf(section: HFSection, task: Task) -> Started:
    """In this process on the weights in training or on its own, or in a process beside training."""
    import torch

    from prefopt.engines.hf import HFEngine

    training, device = task.training, section.device or task.device
    if training is not None and training.separate_process:
        return Started(_beside(section, task, training, device), None)
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    common: Any = {
        "pad_id": task.pad_id,
        "batch_size": section.batch_size,
        "dtype": dtype,
        "timeout_s": section.timeout_s,
    }
    if training is None:
        loaded = HFEngine.load(task.model, None, seed=0, device=device, **common)
        return Started(loaded, loaded.context)
    policy = training.policy
    sharing = HFEngine.sharing(
        policy.model, share_trainable=training.share_trainable, half=policy.half, **common
    )
    return Started(sharing, sharing.context)


def _beside(section: HFSection, task: Task, training: InTraining, device: str) -> ProcessEngine:
    source = HFSource(
        task.model,
        task.pad_id,
        peft=training.peft,
        seed=training.seed,
        device=device,
        dtype=None if section.dtype == "auto" else section.dtype,
        batch_size=section.batch_size,
        timeout_s=section.timeout_s,
        cpus=section.cpus,
    )
    return ProcessEngine(
        source,
        log_dir=task.log_dir,
        startup_timeout_s=section.startup_timeout_s,
        max_restarts=section.max_restarts,
    )


class _ChildDied(Exception):
    """The child ended before it answered; the message says how, and quotes its log."""


class ProcessEngine:
    """Runs an `HFEngine` in a child process; started on first use, or by `start`.

    Args:
        source: what the child loads.
        log_dir: where the child's output goes, ``hf-engine.log``.
        startup_timeout_s: longest wait for the child to load.
        max_restarts: times a child that died is started again, given the current policy (whose files must
            still be there) and asked again.
    """

    name = "hf"

    def __init__(
        self,
        source: HFSource,
        *,
        log_dir: Path,
        startup_timeout_s: float = 900.0,
        max_restarts: int = 2,
    ) -> None:
        self.source = source
        self.log = log_dir / "hf-engine.log"
        self.startup_timeout_s = startup_timeout_s
        self.restarts_left = max_restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._numbers = itertools.count()
        self._policy: PolicyFiles | None = None

    @property
    def version(self) -> int | None:
        return None if self._policy is None else self._policy.version

    @property
    def pid(self) -> int | None:
        """Of the child, if it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the child if it does not run, and waits until it has loaded the policy.

        Raises: EngineError if it dies or is not ready in ``startup_timeout_s``; what loading raises.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        ours, theirs = multiprocessing.Pipe()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(len(self.source.cpus))} if self.source.cpus else None
        with theirs, self.log.open("ab") as output:
            command = [sys.executable, "-m", "prefopt.engines.worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                env=clean_environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer to handle
            )
        self._pipe = ours
        try:
            self._exchange((self.source,), self.startup_timeout_s, "to load the policy")
            if self._policy is not None:
                what = f"to load policy version {self._policy.version} again"
                self._exchange(("load_policy", (self._policy,)), self.source.timeout_s, what)
        except _ChildDied as error:
            raise EngineError(f"the hf engine's process did not start: {error}") from None

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        """As `Engine.generate`."""
        return self._call("generate", (list(requests), spec))

    def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[float]]:
        """As `Engine.score`."""
        return self._call("score", (list(sequences),))

    def load_policy(self, policy: PolicyFiles) -> None:
        """As `Engine.load_policy`; the files must stay until the next version is loaded."""
        self._call("load_policy", (policy,))
        self._policy = policy

    def close(self) -> None:
        self._stop()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The child's answer; where it dies, a new child's, as long as restarts are left."""
        while True:
            self.start()
            try:
                return self._exchange((method, arguments), self.source.timeout_s, f"for {method}")
            except _ChildDied as error:
                if self.restarts_left <= 0:
                    raise EngineError(
                        f"the hf engine's process died during {method} ({error}\nNo restart is left "
                        "(engine.max_restarts)"
                    ) from None
                self.restarts_left -= 1
                logger.warning(
                    "the hf engine's process died during %s; starting it again (%d restarts left): %s",
                    method, self.restarts_left, str(error).splitlines()[0],
                )  # fmt: skip

    def _exchange(self, message: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        """Sends one message and waits for the answer to it, watching the child meanwhile."""
        pipe, process = self._pipe, self._process
        assert pipe is not None and process is not None
        number = next(self._numbers)
        deadline = time.monotonic() + timeout_s + _GRACE_S
        # a child that reads nothing would block a large send for ever, so it has a thread of its own
        threading.Thread(target=_send, args=(pipe, (number, *message)), daemon=True).start()
        while True:
            try:
                if pipe.poll(_POLL_S):
                    answered, error, result = pipe.recv()
                    assert answered == number
                    break
            except (EOFError, OSError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
            if (code := process.poll()) is not None:
                raise _ChildDied(f"{describe_exit(code)}); {log_tail(self.log)}")
            if time.monotonic() > deadline:
                self._stop()
                raise EngineError(
                    f"waited {timeout_s:g} s {what} by the hf engine's process and had no answer; it was "
                    f"ended. Raise engine.timeout_s (or engine.startup_timeout_s); {log_tail(self.log)}"
                )
        if error is not None:
            raise getattr(errors, error)(f"the hf engine's process: {result}")
        return result

    def _stop(self) -> None:
        if self._process is not None:
            kill_group(self._process.pid)
            self._process.wait()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def _send(pipe: Connection, message: Any) -> None:
    with contextlib.suppress(OSError):  # the child is gone: whoever waits for the answer finds out
        pipe.send(message)
