"""Checks whether a dotted path names something, without running its module."""

from __future__ import annotations

import ast
import importlib.util
import pathlib


def why_not_importable(path: str) -> str | None:
    """Return why `package.module.name` cannot be imported, or None when it seems to exist.

    Parent packages are imported, as Python must to find a module; the module itself is only parsed.
    """
    module, _, name = path.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        return f"its module cannot be found ({error})"
    except Exception as error:  # a parent package is user code, which can fail in any way
        return f"importing its package failed ({type(error).__name__}: {error})"
    if spec is None:
        return f"there is no module {module}"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None  # built in or compiled: only importing could tell
    try:
        tree = ast.parse(pathlib.Path(spec.origin).read_bytes())
    except SyntaxError as error:
        return f"{module} does not parse (line {error.lineno}: {error.msg})"
    names = {name for statement in ast.walk(tree) for name in _bound_names(statement)}
    return None if name in names or names & {"*", "__getattr__"} else f"{module} defines no {name}"


def _bound_names(node: ast.AST) -> list[str]:
    """Return the names that a statement binds; nested ones are included, which accepts too much."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name.partition(".")[0] for alias in aliases]
        case _:
            return []
