"""``python -m prefopt.engines.worker FD PARENT``: the child of a `ProcessEngine`; serves one engine over a pipe.

Started as a module and not through `multiprocessing`: a spawned child would import the user's own script
again, and would inherit the launcher's environment. It outlives nobody: a thread ends it when its parent is
gone, whatever it computes at the time. (PR_SET_PDEATHSIG would end it with the parent's *thread* that started
it, and rollouts run in threads.)
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from prefopt.errors import ConfigError, PrefoptError

if TYPE_CHECKING:
    from prefopt.engines.process import HFSource

_POLL_S = 0.5
_CALLS = ("generate", "score", "load_policy")


def main(descriptor: int, parent: int) -> None:
    """Loads the engine the parent describes, then answers ``(number, method, arguments)`` until the pipe ends."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(descriptor)
    number, source = pipe.recv()
    engine = _answer(pipe, number, lambda: _load(source), reply=lambda _: None)
    if engine is None:
        return
    while True:
        try:
            number, method, arguments = pipe.recv()
        except EOFError:
            return
        assert method in _CALLS
        _answer(pipe, number, lambda: getattr(engine, method)(*arguments))  # noqa: B023 (called at once)


def _load(source: HFSource) -> Any:
    if source.cpus:
        _bind(source.cpus)  # before torch counts the cores
    return source.load()


def _bind(cpus: Sequence[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise ConfigError(
            f"engine.cpus = {list(cpus)}: it cannot be bound to them ({error}). This machine has cores 0 to "
            f"{(os.cpu_count() or 1) - 1}; a container may be allowed fewer"
        ) from error


def _answer(pipe: Connection, number: int, work: Any, reply: Any = lambda result: result) -> Any:
    """What ``work`` returns, after it was sent; None if it failed, which the parent is then told."""
    try:
        result = work()
    except PrefoptError as error:
        pipe.send((number, type(error).__name__, str(error)))
    except Exception:
        pipe.send((number, "EngineError", f"it failed:\n{traceback.format_exc()}"))
    else:
        pipe.send((number, None, reply(result)))
        return result
    return None


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
