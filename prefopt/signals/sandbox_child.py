"""The process model-written Python runs in; started by `prefopt.signals.sandbox`, standard library only.

Reads its orders from standard input, gives up every right it does not need (`sandbox_walls`), tries whether
they are gone (`sandbox_promises`) and says so on the result pipe; then it runs the program and, if that ran to
its end, writes the token it was given there.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from types import ModuleType


def main() -> None:
    """Runs one program under the orders on standard input."""
    orders = json.load(sys.stdin)
    result = int(orders["result_fd"])
    if not _behind_walls(orders, result):
        os._exit(1)
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


def _behind_walls(orders: dict, result: int) -> bool:
    """Isolates this process and says on the result pipe what holds; whether the program may run."""
    _know_siblings()
    from prefopt.signals import sandbox_promises, sandbox_walls

    try:
        built = sandbox_walls.isolate(orders)
        tried = sandbox_promises.try_all(orders)
    except (OSError, RuntimeError) as error:
        os.write(result, json.dumps({"unable": str(error)}).encode() + b"\n")
        return False
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "prefopt"]:
            del sys.modules[name]  # the program imports what it would without us
    broken = [each for each in tried if not each.held]
    may_run = all(each.promise in orders["accept"] for each in broken) and not orders["examine"]
    said = {"may_run": may_run, "built": built, "tried": tried if orders["examine"] else broken}
    os.write(result, json.dumps(said).encode() + b"\n")
    return may_run


def _know_siblings() -> None:
    """Makes the modules beside this one importable by their names, and nothing else of the package.

    The folder on ``sys.path`` would hide modules such as ``math``; the package may not be installed, and its
    own `__init__` is none of a program's business.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    for name, folder in (("prefopt", os.path.dirname(here)), ("prefopt.signals", here)):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [folder]


if __name__ == "__main__":
    main()
