"""What a module declares of a registered function, read from its source: nothing the function computes with loads.

A decorator, a keyword-only signature and a docstring say all that a recipe is checked against, and importing
the module may take seconds (torch). So the names that these mention are looked up at the head of the source,
and only the statements that bind them are run.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_BODY = ast.parse("raise RuntimeError('a declaration is read, not called')").body


def run_declaration(module: str, name: str, decorator: str) -> None:
    """Registers the entry ``name`` of ``module`` with a function that has its signature and docstring, no body.

    Does nothing where the source does not say it plainly; importing the module then will.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = [node for node in tree.body if _declares(node, name, decorator)]
    if len(found) != 1 or not isinstance(found[0], ast.FunctionDef):
        return
    bare = _without_body(found[0])
    program = ast.Module([*_bindings(tree, bare), bare], type_ignores=[])
    namespace = {"__name__": module, "_declaration": _declaration}
    code = compile(ast.fix_missing_locations(program), spec.origin, "exec", dont_inherit=True)
    try:
        exec(code, namespace)
    except NameError:  # bound by a statement of another kind, e.g. inside an `if`
        return


def is_declaration(function: Callable[..., Any]) -> bool:
    """Was it made by `run_declaration`, and so has no body?"""
    return getattr(function, "__prefopt_declaration__", False)


def _declaration(function: Callable[..., Any]) -> Callable[..., Any]:
    function.__prefopt_declaration__ = True  # type: ignore[attr-defined]
    return function


def _declares(node: ast.stmt, name: str, decorator: str) -> bool:
    """Is this ``@decorator("name", …)`` on a function?"""
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == decorator
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == name
        for call in getattr(node, "decorator_list", [])
    )


def _without_body(function: ast.FunctionDef) -> ast.FunctionDef:
    """The function with its keyword-only arguments annotated alone, and its docstring for a body."""
    arguments = function.args
    for each in [*arguments.posonlyargs, *arguments.args]:
        each.annotation = None
    function.returns = None
    has_text = ast.get_docstring(function, clean=False) is not None
    function.body = [*function.body[:has_text], *_BODY]
    function.decorator_list.append(ast.Name("_declaration", ast.Load()))
    return function


def _bindings(tree: ast.Module, bare: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of the module's head that bind what ``bare`` mentions, and what those mention, in order."""
    binds = {name: node for node in tree.body for name in _bound_names(node)}
    wanted, needed = [bare], {bare}
    while wanted:
        for name in _mentioned(wanted.pop()):
            node = binds.get(name)
            if node is not None and node not in needed:
                needed.add(node)
                wanted.append(node)
    found = [node for node in tree.body if node in needed - {bare}]
    used = {name for node in needed for name in _mentioned(node)}
    return [_only(node, used) for node in found]


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((each.asname or each.name).split(".")[0] for each in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _mentioned(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _only(node: ast.stmt, used: set[str]) -> ast.stmt:
    """An import of the used names alone; any other statement as it is."""
    if isinstance(node, ast.ImportFrom):
        names = [each for each in node.names if (each.asname or each.name) in used]
        return ast.ImportFrom(node.module, names, node.level)
    return node
