"""The process model-written Python runs in; started by `prefopt.signals.sandbox`, standard library only.

Takes its orders from a pipe, gives up every right it does not need, tries whether they are gone
(`sandbox_walls`, `sandbox_promises`), and runs the program as Python runs a file. What it must not know comes
only when it ran: its tests or the arguments of a call, and behind them the token, which is read when the tests
have passed.
"""

from __future__ import annotations

import builtins
import os
import sys
import traceback
from json import dumps, loads
from os import _exit, read, write
from types import ModuleType

# What carries messages is imported by name: a program may put functions of its own into a module.
_FILE = "program.py"


def main() -> None:
    """Runs one program: ``sandbox_child.py ORDERS_FD RESULT_FD``."""
    orders_fd, result = int(sys.argv[1]), int(sys.argv[2])
    _know_siblings()
    from prefopt.signals import sandbox_promises, sandbox_source, sandbox_tests, sandbox_walls

    for name in [name for name in sys.modules if name.split(".")[0] == "prefopt"]:
        del sys.modules[name]  # the program imports what it would without us
    source, tests = sandbox_source, sandbox_tests
    order = loads(_message(orders_fd))
    if not _behind_walls(order, result, sandbox_walls, sandbox_promises):
        _exit(1)
    if order.get("script"):
        return _script(order, source)
    try:
        _checked(order, source, tests, orders_fd, result)
    except (
        BaseException
    ):  # SystemExit too: a program that leaves before its tests has not passed them
        _fail()
    write(result, _message(orders_fd))
    _exit(0)  # threads and exit handlers of the program get no say


def _checked(
    order: dict, source: ModuleType, tests: ModuleType, orders_fd: int, result: int
) -> None:
    """The program, then what comes once it ran: tests, a call, or nothing."""
    file = os.path.abspath(_FILE)
    untouched = tests.Untouched(order.get("imports") or [], file)
    name = order.get("module") or "__main__"
    module = _module(name, file)
    # The program can reach these through the frames below its own.
    rooms = [(room, dict(room)) for room in (globals(), vars(tests))]
    if order.get("call"):
        exec(
            "from typing import *", vars(module)
        )  # starter code of contests names List and Optional
    _execute(module, source, source.units(order), file)
    for room, kept in rooms:
        room.clear()
        room.update(kept)
    _name(module, name)
    write(result, b"loaded\n")
    after = loads(_message(orders_fd))
    untouched.restore()
    if "arguments" in after:
        value = _called(module, order["call"], after["arguments"])
        write(result, dumps(value, default=_plain).encode() + b"\n")
    elif after.get("tests") is not None:
        runs = tests.Runs()
        exec(compile(after.pop("tests"), "<tests>", "exec", dont_inherit=True), vars(module))
        runs.check()
        untouched.check()


def _script(order: dict, source: ModuleType) -> None:
    """A program that reads and prints; ends as Python does, with its buffers written and its threads joined."""
    file = os.path.abspath(_FILE)
    module = _module("__main__", file)
    try:
        _execute(module, source, source.units(order), file)
    except SystemExit:
        raise
    except BaseException:
        _fail()


def _execute(module: ModuleType, source: ModuleType, units: list, file: str) -> None:
    """Runs units in a module, in order. An example that fails is passed over."""
    text, codes = source.compiled(units, file)
    try:
        with open(file, "w", encoding="utf-8") as written:  # for tracebacks and inspect
            written.write(text)
    except (OSError, UnicodeError):
        pass
    for code, must in codes:
        try:
            if code is not None:
                exec(code, vars(module))
        except BaseException:
            if must:
                raise


def _module(name: str, file: str) -> ModuleType:
    """The module that the program runs in: what pickle, dataclasses, unittest and doctest look up."""
    module = ModuleType(name)
    vars(module)["__file__"] = file
    _name(module, name)
    sys.argv = [file]
    return module


def _name(module: ModuleType, name: str) -> None:
    """Gives it its place and the builtins; again before its tests, for it may have given both away."""
    vars(module)["__builtins__"] = builtins
    sys.modules["__main__"] = sys.modules[name] = module


def _called(module: ModuleType, name: str, arguments: list) -> object:
    function = vars(module).get(name)
    if function is None:
        function = getattr(vars(module)["Solution"](), name)
    return function(*arguments)


def _plain(value: object) -> object:
    """What JSON has no word for: arrays and numbers of numpy by their own methods, and any other sequence."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    return list(value)  # type: ignore[call-overload]


def _fail() -> None:
    try:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        _exit(1)


def _message(descriptor: int) -> bytes:
    """The next message: eight bytes of length, then as many bytes. No more is read: what follows stays unseen."""
    return _exactly(descriptor, int.from_bytes(_exactly(descriptor, 8), "big"))


def _exactly(descriptor: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        chunk = read(descriptor, size - len(found))
        if not chunk:
            raise EOFError("the orders ended early")
        found += chunk
    return found


def _behind_walls(order: dict, result: int, walls: ModuleType, promises: ModuleType) -> bool:
    """Isolates this process and says on the result pipe what holds; whether the program may run."""
    try:
        built = walls.isolate(order)
        tried = promises.try_all(order)
    except (OSError, RuntimeError) as error:
        write(result, dumps({"unable": str(error)}).encode() + b"\n")
        return False
    broken = [each for each in tried if not each.held]
    may_run = all(each.promise in order["accept_risks"] for each in broken) and not order["examine"]
    said = {"may_run": may_run, "built": built, "tried": tried if order["examine"] else broken}
    write(result, dumps(said).encode() + b"\n")
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
