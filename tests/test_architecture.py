"""The walls of docs/design.md section 2, walked: who imports whom, how long files are, what is public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prefopt

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prefopt"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The rooms of `prefopt/`, from the ground up: a room imports those before it, and itself without a circle.
# A new folder or root module is placed here first: an unknown one fails.
ROOMS = (
    "shown",
    "errors",
    "types",
    "storage",
    "process",
    "report",
    "recipe",
    "objectives",
    "credit",
    "data",
    "model",
    "reference",
    "engines",
    "signals",
    "values",
    "training",
    "rollouts",
    "wiring",
    "commands",
    "cli",
)

# Importable only below these modules: a thin, tested seam to what churns.
SEAMS = {"vllm": "prefopt.engines.vllm"}
# What tests and bench compare with: nothing that a run needs.
ORACLES = {"trl"}

# Tables name modules as strings and import them by name; nothing else may do that.
LATE_IMPORTERS = {
    "prefopt",
    "prefopt.data",
    "prefopt.model.attention",
    "prefopt.recipe.load",
    "prefopt.recipe.specs",
    "prefopt.signals.sandbox_tests",  # the modules that a row's tests import
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int:
    """The place of a module's room in `ROOMS`; -1 for the package itself, which imports nothing."""
    if module == "prefopt":
        return -1
    room = module.split(".")[1]
    assert room in ROOMS, f"{module}: {room!r} is not in ROOMS; decide where it belongs"
    return ROOMS.index(room)


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """``(module, line, at module level)`` of every import, those inside functions included.

    ``from prefopt.model import load`` counts as both prefopt.model and prefopt.model.load.
    """
    for node, top in _walk(tree, True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the module in full"
            assert node.module is not None
            yield node.module, node.lineno, top
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, top


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, top
        yield from _walk(child, top and not inside and not type_only)


MODULES = modules()


def uses(name: str) -> dict[str, int]:
    """Modules of the package that a module imports, inside functions too, each with a line."""
    found = {}
    for target, line, _ in imports(ast.parse(MODULES[name].read_text())):
        # `from prefopt.data import Renderer` is an import of the package; of `data.render`, a module's.
        if target in MODULES and target != name and target != "prefopt":
            found[target] = line
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_the_rooms_below_it(name: str) -> None:
    upward = [
        f"line {line}: {target}"
        for target, line in uses(name).items()
        if floor(target) > floor(name)
    ]
    assert not upward, f"{name} imports upwards: {upward}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A package's own name counts only where it is imported from: `__init__` may name its modules."""
    graph = {name: sorted(uses(name)) for name in MODULES}
    for name, targets in graph.items():
        below = [t for t in targets if f"{t}.{name.removeprefix(t + '.')}" != name]
        graph[name] = below
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_rooms_are_the_folders_and_modules_that_exist() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(ROOMS) == found - {"__init__", "__pycache__"}


@pytest.mark.parametrize("name", MODULES)
def test_churning_libraries_stay_behind_their_seam(name: str) -> None:
    for target, line, top in imports(ast.parse(MODULES[name].read_text())):
        library = target.split(".")[0]
        assert library not in ORACLES, f"{name} line {line}: {library} is for tests and bench"
        seam = SEAMS.get(library)
        if seam is None:
            continue
        assert name == seam or name.startswith(f"{seam}."), (
            f"{name} line {line}: {library} is imported only in {seam}"
        )
        assert library != "vllm" or not top, f"{name} line {line}: vllm only inside a method"


@pytest.mark.parametrize("name", MODULES)
def test_import_by_name_hides_no_import(name: str) -> None:
    if name in LATE_IMPORTERS:
        return
    tree = ast.parse(MODULES[name].read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"importlib.import_module", "import_module", "__import__"} & set(calls)


BESIDE = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("eval", "data_pipelines", "recipes", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
"""Files of the packages beside the library, which may import it."""


@pytest.mark.parametrize("path", [*MODULES.values(), *BESIDE.values()], ids=[*MODULES, *BESIDE])
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert not {f: n for f, n in lengths.items() if n > MAX_FUNCTION_LINES}


def test_the_library_imports_neither_recipes_nor_its_siblings() -> None:
    outside = {"recipes", "data_pipelines", "eval", "tests", "bench"}
    for name, path in MODULES.items():
        found = {target.split(".")[0] for target, _, _ in imports(ast.parse(path.read_text()))}
        assert not found & outside, name


@pytest.mark.parametrize("file", [file for file in BESIDE if file.startswith("eval/")])
def test_evaluation_imports_no_pipelines(file: str) -> None:
    """Pipelines take the prompts of eval sets and eval's statistics; the other way round would be a circle."""
    found = {target.split(".")[0] for target, _, _ in imports(ast.parse(BESIDE[file].read_text()))}
    assert not found & {"data_pipelines", "recipes", "tests", "bench"}


@pytest.mark.parametrize(
    "command",
    [
        "import prefopt",
        "import prefopt.recipe.load",
        "import prefopt.recipe.checks",
        "import prefopt.cli; prefopt.cli._parser().format_help()",
        "import prefopt.types",
    ],
)
def test_light_imports_load_no_heavy_library(command: str) -> None:
    script = f"{command}\nimport sys\nprint(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    loaded = {name.split(".")[0] for name in output.split()}
    heavy = {
        "torch",
        "vllm",
        "transformers",
        "peft",
        "accelerate",
        "trl",
        "datasets",
        "openai",
        "scipy",
    }
    assert not loaded & heavy


def test_public_names_resolve_and_are_documented() -> None:
    assert len(prefopt.__all__) <= 15
    for name in prefopt.__all__:
        value = getattr(prefopt, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"prefopt.{name} has no docstring"


def test_a_public_name_is_never_hidden_by_a_module_of_that_name() -> None:
    # Importing prefopt.check would bind the module over the function `prefopt.check`.
    clashes = {name for name in prefopt.__all__ if f"prefopt.{name}" in MODULES}
    assert not clashes


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prefopt.no_such_name
