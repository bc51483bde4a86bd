"""The tests' half of a run: what they use is as it was before the program ran, and a run of no test is no pass.

Loaded by `sandbox_child.py`; standard library only.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from types import ModuleType
from typing import Any

_FRAMEWORKS = ("unittest", "doctest")
_MISSING = object()


class Untouched:
    """Functions and classes of modules that tests will use, as they are before the program runs.

    Args:
        names: of the modules; what cannot be imported is left to the tests.
        file: of the program.
    """

    def __init__(self, names: list[str], file: str) -> None:
        self.file = file
        self.modules: dict[str, ModuleType] = {"builtins": builtins}
        for name in names:
            try:
                importlib.import_module(name)
            except Exception:  # any code may be in there; the tests will see the same
                continue
            package = name.partition(".")[0]
            self.modules |= {
                key: module
                for key, module in list(sys.modules.items())
                if key == name or (package in _FRAMEWORKS and key.split(".")[0] == package)
            }
        for key in ("sys", "__main__"):  # state that a program may set
            self.modules.pop(key, None)
        self.kept = [(owner, dict(vars(owner))) for owner in self._owners()]

    def _owners(self) -> list[Any]:
        found: list[Any] = list(self.modules.values())
        for key, module in self.modules.items():
            if key != "builtins":  # whose classes cannot be changed
                found += [
                    each
                    for each in vars(module).values()
                    if isinstance(each, type) and each.__module__ == module.__name__
                ]
        return found

    def restore(self) -> None:
        """Undoes what the program changed, tracing included."""
        _untrace()
        sys.modules.update(self.modules)
        for owner, kept in self.kept:
            for name in self._changed(owner, kept):
                setattr(owner, name, kept[name])
            for name in [n for n in vars(owner) if n.startswith("__") and n not in kept]:
                if callable(vars(owner)[name]):  # __getattr__, __getattribute__
                    delattr(owner, name)

    def check(self) -> None:
        """Raises: AssertionError if the program changed, while its tests ran, what they use."""
        for owner, kept in self.kept:
            for name in self._changed(owner, kept):
                value = getattr(vars(owner).get(name), "__func__", vars(owner).get(name))
                code = getattr(value, "__code__", None)
                framework = str(getattr(owner, "__module__", owner.__name__)).startswith(
                    _FRAMEWORKS
                )
                if framework or getattr(code, "co_filename", None) == self.file:
                    raise AssertionError(f"the program changed {owner.__name__}.{name}")

    @staticmethod
    def _changed(owner: Any, kept: dict[str, Any]) -> list[str]:
        now = vars(owner)
        return [
            name
            for name, value in kept.items()
            if now.get(name, _MISSING) is not value
            and (callable(value) or isinstance(value, (classmethod, staticmethod, property)))
        ]


def _untrace() -> None:
    """A trace function could jump over the tests' lines."""
    sys.settrace(None)
    sys.setprofile(None)
    threading.settrace(None)  # type: ignore[arg-type]
    threading.setprofile(None)
    monitoring: Any = getattr(sys, "monitoring", None)  # Python 3.12
    for tool in range(6) if monitoring else ():
        if monitoring.get_tool(tool) is not None:
            monitoring.free_tool_id(tool)


class Runs:
    """Counts what unittest and doctest run, so that a run without tests, or with a failure, is no pass."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.undo: list[tuple[Any, str, Any]] = []
        if "unittest" in sys.modules:
            self._watch_unittest(sys.modules["unittest"])
        if "doctest" in sys.modules:
            self._watch_doctest(sys.modules["doctest"])

    def check(self) -> None:
        """Raises: AssertionError for a run that failed or found nothing, whatever became of its result."""
        for owner, name, value in self.undo:
            setattr(owner, name, value)
        if self.problems:
            raise AssertionError("; ".join(self.problems))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _watch_unittest(self, unittest: Any) -> None:
        run, run_tests = unittest.TextTestRunner.run, unittest.TestProgram.runTests

        def watched(runner: Any, test: Any) -> Any:
            result = run(runner, test)
            if not result.testsRun or not result.wasSuccessful():
                self.problems.append(f"unittest: {result.testsRun} tests, {result}")
            elif len(result.skipped) == result.testsRun:
                self.problems.append("unittest: every test was skipped")
            return result

        def without_exit(program: Any) -> None:
            program.exit = False  # unittest.main() leaves with 0 where all is well
            run_tests(program)

        self._replace(unittest.TextTestRunner, "run", watched)
        self._replace(unittest.TestProgram, "runTests", without_exit)

    def _watch_doctest(self, doctest: Any) -> None:
        run = doctest.DocTestRunner.run
        ran = [0]

        def watched(runner: Any, *arguments: Any, **named: Any) -> Any:
            result = run(runner, *arguments, **named)
            ran[0] += result.attempted
            if result.failed:
                self.problems.append(f"doctest: {result.failed} of {result.attempted} failed")
            return result

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                before = ran[0]
                result = function(*arguments, **named)
                if ran[0] == before:
                    self.problems.append("doctest: no example was found")
                return result

            return call

        self._replace(doctest.DocTestRunner, "run", watched)
        for name in ("testmod", "testfile", "run_docstring_examples"):
            self._replace(doctest, name, counted(getattr(doctest, name)))
