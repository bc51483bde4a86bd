"""Whether the plugins of a recipe are run: they are a program, and a recipe may be a stranger's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_LEFT_OUT: ContextVar[list[str] | None] = ContextVar("plugins_left_out", default=None)
OPTION = "--no-plugins"


@contextlib.contextmanager
def without_plugins(*, active: bool = True) -> Iterator[None]:
    """No plugin is imported until the block ends; with ``active`` False they are, as everywhere else."""
    token = _LEFT_OUT.set([] if active else None)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)


def leave_out(plugin: str) -> bool:
    """Is this plugin not to be run? It is remembered, to explain what is then not known."""
    left_out = _LEFT_OUT.get()
    if left_out is None:
        return False
    if plugin not in left_out:
        left_out.append(plugin)
    return True


def why_unknown() -> str:
    """What to add to an error about a name that no one has registered; empty where every plugin was run."""
    left_out = _LEFT_OUT.get()
    if not left_out:
        return ""
    return f" It may be one of {', '.join(left_out)}, which was not run because of {OPTION}."
