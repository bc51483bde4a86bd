"""Whether two expressions are the same number, exactly: math-verify rounds to 6 places, or chops at 15 digits.

Loads sympy, so only the process that verifies imports this.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import sympy
from math_verify import grader

_PLACES = 6
"""Of a decimal that stands for a value without a finite one (1/3, π): fewer are too few, as in math-verify."""
_RELATIVE = sympy.Float("1e-12")
"""How far two irrational values may be apart, as a share of the larger: 30 digits of each err less."""


def compare_exactly() -> None:
    """Has math-verify compare numbers with `same_value`, wherever they stand: alone, in sets, intervals, matrices.

    Raises: AttributeError where this version of it has no such place.
    """
    _ = grader.sympy_numeric_eq
    grader.sympy_numeric_eq = same_value


def same_value(a: Any, b: Any, float_rounding: int = 0, numeric_precision: int = 0) -> bool:
    """Are two sympy expressions equal? In the place, and with the arguments, of math-verify's own comparison.

    Rationals, and decimals as they are written, are equal if they are the same fraction. A decimal of 6 places and
    digits or more is also equal to a value without a finite decimal that rounds to it. 9 % is both 9 and 0.09.
    """
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        pairs = zip(a.flat(), b.flat(), strict=False)
        return a.shape == b.shape and all(same_value(*pair) for pair in pairs)
    bare_a, bare_b = grader.get_pct_val(a, a), grader.get_pct_val(b, b)
    return any(_same(*pair) for pair in dict.fromkeys([(a, b), (bare_a, b), (a, bare_b)]))


def _same(a: Any, b: Any) -> bool:
    try:
        exact_a, exact_b = _exact(a), _exact(b)
        if exact_a.free_symbols or exact_b.free_symbols:
            return sympy.expand(exact_a - exact_b) == 0
        if exact_a.is_Rational and exact_b.is_Rational and exact_a == exact_b:
            return True
        decimals = [isinstance(each, sympy.Float) for each in (a, b)]
        if decimals == [True, False]:
            return _rounds_to(exact_b, exact_a)
        if decimals == [False, True]:
            return _rounds_to(exact_a, exact_b)
        if exact_a.is_Rational and exact_b.is_Rational:
            return False
        if not (exact_a.is_finite and exact_b.is_finite):
            return exact_a == exact_b
        difference, largest = abs(exact_a - exact_b), sympy.Max(abs(exact_a), abs(exact_b))
        return bool(difference.evalf(30) <= _RELATIVE * largest.evalf(30))
    except (TypeError, AttributeError, ValueError, NotImplementedError):
        return False  # no numbers: infinity, a truth value, an interval


def _exact(expression: Any) -> Any:
    """``expression`` worked out, with the fractions that its decimals are."""
    found = expression.doit()
    decimals = {each: sympy.Rational(str(each)) for each in found.atoms(sympy.Float)}
    return found.xreplace(decimals).doit() if decimals else found


def _rounds_to(value: Any, decimal: Any) -> bool:
    """Does ``value``, which has no finite decimal, round to ``decimal``?"""
    if value.is_Rational and set(sympy.factorint(value.q)) <= {2, 5}:
        return False
    digits = Decimal(decimal.p) / Decimal(decimal.q)  # at most 28 of them
    places = -int(digits.as_tuple().exponent)
    if places < _PLACES or len(digits.as_tuple().digits) < _PLACES:
        return False
    return bool(abs(value - decimal).evalf(30) * 2 <= sympy.Rational(1, 10**places))
