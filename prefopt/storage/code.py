"""A hash of what a Python file does."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path


def code_hash(path: Path) -> str:
    """Of its syntax tree: comments, docstrings and layout do not count.

    Imports do not count either: a module that moves changes those of many, and what none of them does.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not _does_nothing(each)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _does_nothing(node: ast.AST) -> bool:
    """An import, or a docstring of a module, a function or an attribute."""
    value = getattr(node, "value", None)
    text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and text)
