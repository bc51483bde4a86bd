"""From what a response says to the sources that are run, in order; standard library only.

Loaded by `sandbox_child.py`, inside the walls: what a model wrote is parsed nowhere else.
"""

from __future__ import annotations
import __future__ as features

import ast
import re
import textwrap
from types import CodeType

_DEFINES = re.compile(r"^[ \t]*(async[ \t]+def|def|class)\b", re.MULTILINE)
_READS = re.compile(
    r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b|/dev/stdin|\bread\s*\(\s*0"
)
_FUTURE = sum({getattr(features, name).compiler_flag for name in features.all_feature_names})

Unit = tuple[str, bool]
"""A source, and whether it must run: an example that shows how to use the code need not."""


def units(order: dict) -> list[Unit]:
    """What is run for an order, in order.

    Args:
        order: ``readings`` (see `prefopt.signals.markdown_code`); ``before``: source put before the code;
            ``entry_point``: the function that ``before`` began, for which the code may be the body alone;
            ``script``: a program of its own, which reads and prints.
    """
    code = _chosen(order["readings"])
    if order.get("script"):
        code = _script(code)
    before, entry_point = order.get("before") or "", order.get("entry_point")
    if not before.strip():
        return _straight(code)
    if entry_point is not None:
        return _completed(before, entry_point, code)
    if not code:
        return [(before, True)]
    joined = f"{before}\n\n{code[0][0]}"
    goes_on = _raw(code[0][0]) is None and _raw(joined) is not None
    if goes_on or tree(before) is None:
        return [(joined, True), *_straight(code[1:])]
    return [(before, True), *_straight(code)]


def compiled(found: list[Unit], file: str) -> tuple[str, list[tuple[CodeType | None, bool]]]:
    """The text of the file that holds all units, and the code of each; None for an example that is no Python.

    Every unit has its own ``from __future__`` on top, and those of units before it. Raises: what `compile` raises.
    """
    text, flags, result = "", 0, []
    for source, must in found:
        try:
            # the line breaks give each its place in the file, for tracebacks and inspect
            code = compile("\n" * text.count("\n") + source, file, "exec", flags, dont_inherit=True)
            flags |= code.co_flags & _FUTURE
        except (SyntaxError, ValueError):
            if must:
                raise
            code = None
        result.append((code, must))
        text += source + "\n\n"
    return text, result


def tree(source: str) -> ast.Module | None:
    """The tree of a source, None if it is no Python."""
    return _raw(textwrap.dedent(source))


def _raw(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _chosen(readings: list[list[tuple[str, bool]]]) -> list[Unit]:
    """The units of the first reading that is Python, else of the first fences, whose error will be seen."""
    candidates = [_units_of(reading) for reading in readings]
    for number, found in enumerate(candidates):
        parsed = [tree(source) for source, must in found if must]
        if parsed and None not in parsed and (number == 0 or any(map(_is_program, parsed))):
            return found
    found = next((found for found in candidates[1:] if found), candidates[0])
    return found


def _units_of(reading: list[tuple[str, bool]]) -> list[Unit]:
    """Blocks in order. Where one defines something, those that do not are examples and may fail.

    So may one that is no Python before one that defines: an error that is shown, then mended.
    """
    kept = []
    for source, marked in reading:
        # unmarked beside marked: output as often as code
        if source.strip() and (marked or (_DEFINES.search(source) and tree(source))):
            kept.append(source)
    defines = [bool(_DEFINES.search(source)) for source in kept]
    if not any(defines):
        return [(source, True) for source in kept]
    whole = [own and tree(source) is not None for source, own in zip(kept, defines, strict=True)]
    last = max((number for number, own in enumerate(whole) if own), default=-1)
    return [
        (source, defines[number] and (whole[number] or number > last))
        for number, source in enumerate(kept)
    ]


def _is_program(found: ast.Module | None) -> bool:
    """False for a word or a number, which are Python too."""
    return found is not None and any(
        not isinstance(each, ast.Expr) or isinstance(each.value, (ast.Call, ast.Await, ast.Yield))
        for each in found.body
    )


def _script(code: list[Unit]) -> list[Unit]:
    """Of several programs that read input the last, after what stands before it and is none."""
    programs = [n for n, (source, _) in enumerate(code) if _READS.search(source) and _acts(source)]
    if not programs:
        return [(source, True) for source, _ in code]
    last = programs[-1]
    helpers = [each for n, each in enumerate(code[:last]) if n not in programs and each[1]]
    return [*helpers, (code[last][0], True)]


def _acts(source: str) -> bool:
    """Whether it does more than define: True too for what is no Python."""
    found = tree(source)
    return found is None or not all(only_defines(each) for each in found.body)


def only_defines(node: ast.stmt) -> bool:
    """Whether a statement calls nothing: an import, a definition, a constant."""
    kinds = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Pass,
    )
    if isinstance(node, kinds) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return True
    assigns = isinstance(node, (ast.Assign, ast.AnnAssign))
    return assigns and not any(isinstance(each, ast.Call) for each in ast.walk(node))


def _completed(before: str, entry_point: str, code: list[Unit]) -> list[Unit]:
    """The code after the prompt whose function it defines, or as the body of that function."""
    if any(entry_point in _bound(tree(source)) for source, _ in code):
        head = [each for each in (before, f"{before.rstrip()}\n    pass\n") if tree(each)]
        return [*((each, True) for each in head[:1]), *_straight(code)]
    body = "\n".join(textwrap.dedent(source) for source, must in code if must)
    return [(before.rstrip("\n") + "\n" + textwrap.indent(body, "    "), True)]


def _straight(code: list[Unit]) -> list[Unit]:
    """Sources without the indentation that all their lines share, where it keeps them from being Python."""
    return [
        (textwrap.dedent(source) if _raw(source) is None and tree(source) else source, must)
        for source, must in code
    ]


def _bound(found: ast.Module | None) -> set[str]:
    """The names that a module binds, by whatever statement."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(found.body) if found else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        if not isinstance(node, ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names
