"""The operators of Python, for values of which some may be open."""

from __future__ import annotations

import ast
import operator
import os.path
from collections.abc import Callable, Mapping
from typing import Any

from miles.migrate.open_values import is_open
from miles.migrate.python_values import Unknown

LONGEST = 1_000_000
"""Letters or elements of a value; what would be longer is not evaluated."""


def _power(base: int | float, exponent: int) -> int | float:
    if abs(base) > 1024 or not 0 <= exponent <= 6:
        raise Unknown
    result: int | float = base**exponent
    return result


_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.BitOr: operator.or_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda a, b: a is b or (isinstance(a, str | int) and a == b),
    ast.IsNot: lambda a, b: not (a is b or (isinstance(a, str | int) and a == b)),
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def operated(op: ast.AST, left: Any, right: Any) -> Any:
    """Return `left op right`. Raises Unknown when that depends on what is open, or would be too long."""
    texts = [each for each in (left, right) if isinstance(each, str) and is_open(each)]
    if texts and not (isinstance(op, ast.Add | ast.Div) and isinstance(left, str) and isinstance(right, str)):
        raise Unknown
    if isinstance(op, ast.Div) and isinstance(left, str):
        return os.path.join(left, right)
    numbers = all(isinstance(each, int | float) for each in (left, right))
    if isinstance(op, ast.Mult) and not numbers and any(isinstance(e, int) and e > LONGEST for e in (left, right)):
        raise Unknown
    return _OPERATORS[type(op)](left, right)


def compared(op: ast.AST, left: Any, right: Any) -> bool:
    """Return whether a comparison holds. Raises Unknown when that depends on what is open; that is never None."""
    if None not in (left, right) and any(isinstance(each, str) and is_open(each) for each in (left, right)):
        raise Unknown
    return bool(_OPERATORS[type(op)](left, right))
