"""The process model-written Python runs in; started by `prefopt.signals.sandbox`, standard library only.

Reads its orders from standard input, gives up every right it does not need, makes sure that they are gone
(`sandbox_walls.py`), runs the program and, if it ran to its end, writes the token it was given to the result
pipe.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from types import ModuleType


def main() -> None:
    """Runs one program under the orders on standard input."""
    orders = json.load(sys.stdin)
    result, walls = int(orders["result_fd"]), _sibling("sandbox_walls")
    try:
        walls.limit(orders)
        walls.isolate()
        walls.verify()
    except (OSError, RuntimeError) as error:
        os.write(result, f"cannot isolate: {error}\n".encode())
        os._exit(1)
    os.write(result, b"ready\n")
    try:
        exec(compile(orders["program"], "<program>", "exec"), {"__name__": "__main__"})
    except (
        BaseException
    ):  # SystemExit too: a program that leaves before its tests has not passed them
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os.write(result, orders["token"].encode())
    os._exit(0)  # threads and exit handlers of the program get no say


def _sibling(name: str) -> ModuleType:
    """A module of this folder, by its file: the folder on ``sys.path`` would hide modules such as ``math``."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    module = ModuleType(name)
    SourceFileLoader(name, path).exec_module(module)
    return module


if __name__ == "__main__":
    main()
