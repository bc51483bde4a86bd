"""The walls of docs/design.md section 2, walked: who imports whom, how long files are, what is public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefopt

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prefopt"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Layer by module or package; the longest name that fits counts. A module may import its own layer and
# those below. A new module is placed here first: an unknown one fails.
LAYERS = {
    "prefopt": 0,
    "prefopt.errors": 0,
    "prefopt.types": 0,
    "prefopt.recipe.registry": 0,
    "prefopt.storage.cache": 0,
    "prefopt.recipe": 1,
    "prefopt.recipe.checks": 1,
    "prefopt.model.logps": 2,
    "prefopt.model.layouts": 2,
    "prefopt.model.attention.reference": 2,
    "prefopt.model.collate": 2,
    "prefopt.objectives": 2,
    "prefopt.credit": 2,
    "prefopt.signals.base": 2,
    "prefopt.engines.base": 2,
    "prefopt.training.optimizer": 2,
    "prefopt.training.importance": 2,
    "prefopt.data": 3,
    "prefopt.model": 3,
    "prefopt.engines": 3,
    "prefopt.signals": 3,
    "prefopt.values": 3,
    "prefopt.recipe.peft_config": 1,  # configuration only; the check builds it as loading will
    "prefopt.reference.store": 3,
    "prefopt.model.windows": 2,
    "prefopt.training.regimes": 4,
    "prefopt.training.draws": 4,
    "prefopt.rollouts": 4,
    "prefopt.training.metrics": 4,
    "prefopt.training.batch_metrics": 4,
    "prefopt.model.distributed": 4,
    "prefopt.training.checkpoint": 4,
    "prefopt.model.sweep": 4,
    "prefopt.reference.live": 4,
    "prefopt.training.reduction": 4,
    "prefopt.reference.stored": 4,
    "prefopt.training.generation_probe": 4,
    "prefopt.training.trainer": 5,
    "prefopt.stages": 5,
    "prefopt.training.run_record": 5,
    "prefopt.rollouts.setup": 6,
    "prefopt.training.probe_setup": 6,
    "prefopt.reference.choose": 6,
    "prefopt.wiring": 6,
    "prefopt.commands.export": 6,
    "prefopt.commands.show": 6,
    "prefopt.commands.show_rollouts": 6,
    "prefopt.commands.show_value": 6,
    "prefopt.recipe.help_pages": 6,
    "prefopt.cli": 6,
}

# Importable only below these modules: a thin, tested seam to what churns.
SEAMS = {"trl": "prefopt.stages", "vllm": "prefopt.engines.vllm"}

# The registry's table names modules as strings and imports them by name; nothing else may do that.
LATE_IMPORTERS = {"prefopt", "prefopt.recipe.registry", "prefopt.recipe.load", "prefopt.data"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> int:
    """The layer of a module, from the longest entry of ``LAYERS`` that holds it."""
    parts = module.split(".")
    for end in range(len(parts), 1, -1):
        if ".".join(parts[:end]) in LAYERS:
            return LAYERS[".".join(parts[:end])]
    if module == "prefopt":
        return LAYERS[module]
    raise KeyError(
        f"{module}: not in LAYERS; decide which layer it belongs to (docs/design.md section 2)"
    )


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


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_layer_and_imports_downwards(name: str) -> None:
    mine = layer(name)
    upward = [
        f"line {line}: {target} (layer {layer(target)})"
        for target, line, _ in imports(ast.parse(MODULES[name].read_text()))
        if target in MODULES and layer(target) > mine
    ]
    assert not upward, f"{name} (layer {mine}) imports upwards: {upward}"


def test_layers_name_only_modules_that_exist() -> None:
    packages = {name.rpartition(".")[0] for name in MODULES}
    assert set(LAYERS) <= set(MODULES) | packages


@pytest.mark.parametrize("name", MODULES)
def test_churning_libraries_stay_behind_their_seam(name: str) -> None:
    for target, line, top in imports(ast.parse(MODULES[name].read_text())):
        library = target.split(".")[0]
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
        "import prefopt.stages.requirements"
        if "prefopt.stages.requirements" in MODULES
        else "pass",
    ],
)
def test_light_imports_load_no_heavy_library(command: str) -> None:
    script = f"{command}\nimport sys\nprint(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    loaded = {name.split(".")[0] for name in output.split()}
    assert not loaded & {"torch", "vllm", "transformers", "peft", "accelerate", "trl", "datasets"}


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
