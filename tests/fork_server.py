"""One process that imports what the commands need; tests fork theirs from it, in milliseconds instead of seconds.

Python has one fork server a process: whoever names the modules last names them for everybody. So only this module
does, and a fork that lacks them fails instead of importing torch again.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "prefopt.cli",
    "prefopt.recipe.checks",
    "prefopt.wiring",
    "transformers.models.llama.modeling_llama",
    "data_pipelines.runner",
    "data_pipelines.show",
    "openai",
    *(["deepspeed"] if find_spec("deepspeed") else []),
]
CONTEXT.set_forkserver_preload(_IMPORTED)


def fork(target: Callable[..., Any], *arguments: Any, daemon: bool | None = None) -> BaseProcess:
    """A process, not started yet, that runs ``target(*arguments)`` with the imports done."""
    return CONTEXT.Process(target=_run, args=(target, arguments), daemon=daemon)


def _run(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    missing = [name for name in _IMPORTED if name not in sys.modules]
    assert not missing, f"the fork server has not imported {missing}"
    target(*arguments)
