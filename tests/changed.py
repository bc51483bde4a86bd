"""Runs the tests that a change can break, nearest first, within a minute or two: `make test-changed`.

Near is counted in imports. A test file that imports a changed module, itself or through a helper of the tests,
is at 1; one whose import imports it, at 2; of those as near, first those that name more of what it defines.
`prefopt.recipe.registry` names modules in strings: those count as imports. A file that is no module belongs to the
tests that name it. `make test` is the proof; this is a quick no.
"""

from __future__ import annotations

import ast
import heapq
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prefopt", "eval", "data_pipelines", "recipes", "bench", "tests")
MAX_FILES = 20
"""Test files of some seconds each: about two minutes on two cores."""


@dataclass
class Choice:
    """Test files to run, nearest first, each with its reason, and those that are left out."""

    run: dict[str, str] = field(default_factory=dict)
    too_long: list[str] = field(default_factory=list)
    beyond_the_cap: list[str] = field(default_factory=list)


class Repository:
    """Python files below ``root`` by module name, and what each of them imports and names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = [path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))]
        self.files = {self._module(path): path.relative_to(root).as_posix() for path in paths}
        trees = {name: ast.parse((root / file).read_text()) for name, file in self.files.items()}
        self.strings = {name: set(_strings(tree)) for name, tree in trees.items()}
        self.defined = {name: _defined(tree) for name, tree in trees.items()}
        self.imports = {name: self._imports(name, tree) for name, tree in trees.items()}

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imports(self, module: str, tree: ast.Module) -> set[str]:
        found = {name for name in self.strings[module] if name in self.files and "." in name}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    found.add(below if below in self.files else node.module or "")
        # pytest gives a test the fixtures of every conftest above it.
        if self.files[module].startswith("tests/"):
            parents = [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]
            found |= {f"{parent}.conftest" for parent in parents}
        return (found & self.files.keys()) - {module}

    def tests_near(self, changed: Sequence[str]) -> dict[str, tuple[int, str]]:
        """``{test module: (distance, the changed module)}``."""
        users: dict[str, set[str]] = {name: set() for name in self.files}
        for name, targets in self.imports.items():
            for target in targets:
                users[target].add(name)
        found: dict[str, tuple[int, str]] = {}
        waiting = [(0, name, name) for name in changed]
        heapq.heapify(waiting)
        while waiting:
            distance, name, origin = heapq.heappop(waiting)
            if name in found:
                continue
            found[name] = (distance, origin)
            further = distance + (not name.startswith("tests."))  # a helper adds no distance
            for user in users[name]:
                heapq.heappush(waiting, (further, user, origin))
        return {name: near for name, near in found.items() if _is_test(name)}

    def mentions(self, test: str, module: str) -> int:
        """How many of what ``module`` defines are strings in a test or in a helper it imports: ``"dpo"``."""
        helpers = [name for name in self.imports[test] if name.startswith("tests.")]
        return len(self.defined[module] & set().union(*(self.strings[m] for m in [test, *helpers])))

    def modules_naming(self, file: str) -> list[str]:
        """Modules of the tests with a string that is the file's name or path; test files, also its top folder.

        YAML files are also named without their ending: ``"zero3"``.
        """
        path = Path(file)
        names = {path.name, file, path.stem if path.suffix == ".yaml" else path.name}
        folder = set(path.parts[:-1][:1])
        return [
            name
            for name, strings in self.strings.items()
            if name.startswith("tests.") and strings & (names | folder if _is_test(name) else names)
        ]


def choose(
    repository: Repository, changed: Sequence[str], *, long: Sequence[str], cap: int = MAX_FILES
) -> Choice:
    """The tests for changed files.

    Args:
        changed: paths relative to the root, of files that may be gone.
        long: beginnings of test paths that take minutes; they run only if they are themselves changed.
        cap: most files to run; tests that are themselves changed run all the same.
    """
    modules = {file: name for name, file in repository.files.items()}
    starts = [modules[file] for file in changed if file in modules]
    for file in changed:
        if file not in modules and not file.endswith(".py"):
            starts += repository.modules_naming(file)
    choice = Choice()
    near = repository.tests_near(starts)

    def order(name: str) -> tuple[bool, int, int, str]:
        distance, origin = near[name]
        unchanged = repository.files[name] not in changed
        return unchanged, distance, -repository.mentions(name, origin), name

    for name in sorted(near, key=order):
        file, (distance, origin) = repository.files[name], near[name]
        reason = f"{distance} from {origin}" if distance else "reads it"
        reason = "changed" if file in changed else reason
        if file not in changed and file.startswith(tuple(long)):
            choice.too_long.append(file)
        elif len(choice.run) >= cap and file not in changed:
            choice.beyond_the_cap.append(file)
        else:
            choice.run[file] = reason
    return choice


def changed_files(root: Path, base: str) -> list[str]:
    """What differs from where this branch left ``base``, committed or not, and files that git does not know."""
    start = _git(root, "merge-base", base, "HEAD")
    names = _git(root, "diff", "--name-only", *start)
    return sorted({*names, *_git(root, "ls-files", "--others", "--exclude-standard")})


def _git(root: Path, *words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"test-changed: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def _is_test(module: str) -> bool:
    return module.startswith("tests.") and module.rsplit(".", 1)[-1].startswith("test_")


def _strings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _defined(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def main(base: str = "main") -> int:
    from tests.conftest import LONG

    changed = changed_files(ROOT, base)
    choice = choose(Repository(ROOT), changed, long=[f"tests/{name}" for name in LONG])
    print(f"{len(changed)} files differ from {base}")
    for file, reason in choice.run.items():
        print(f"  {file}  ({reason})")
    for title, files in (
        ("left out, they take minutes", choice.too_long),
        (f"left out, beyond the nearest {MAX_FILES}", choice.beyond_the_cap),
    ):
        if files:
            print(f"{title}: {' '.join(files)}")
    if not choice.run:
        print("no test is near; `make test` runs them all")
        return 0
    # As `make test` runs them: its command is passed on by the Makefile.
    command = [sys.executable, "-m", "pytest", *sys.argv[2:], "-m", "not slow", *choice.run]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
