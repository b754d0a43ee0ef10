"""Evaluates expressions of a launch script in Python, of the kinds that put command lines together."""

from __future__ import annotations

import ast
import json
import os.path
import re
from collections.abc import Mapping
from typing import Any

from miles.migrate.launch import Launch
from miles.migrate.open_values import is_open
from miles.migrate.python_operators import LONGEST, compared, operated
from miles.migrate.python_values import BUILTINS, LIBRARY, METHODS, Class, Function, Instance, Module, Unknown

_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, Unknown, RecursionError)


class Expressions:
    """Evaluates expressions; statements and calls of functions are left to who inherits from it."""

    def __init__(self, launch: Launch, given: Mapping[str, str]) -> None:
        self.launch = launch
        self.given = given

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
        """Call a function or class of the script."""
        raise NotImplementedError

    def attribute_of_module(self, module: Module, name: str) -> Any:
        """Return what a module has under a name."""
        raise NotImplementedError

    def value(self, node: ast.expr, scope: dict[str, Any], name: str = "") -> Any:
        """Return the value of an expression; an open value, called `name`, where it is not known."""
        try:
            found = self._value(node, scope)
            if isinstance(found, str | list | tuple | dict) and len(found) > LONGEST:
                raise Unknown
            called = name and isinstance(node, ast.Call) and isinstance(found, str) and len(found) == 1
            return self.open(node, name) if called and is_open(found) else found
        except _ERRORS:
            return self.open(node, name)

    def open(self, node: ast.expr, name: str = "") -> str:
        """Return an open value for an expression."""
        text = " ".join(ast.unparse(node).split())
        word = re.sub(r"\W+", "_", name or text.partition("(")[0]).strip("_").upper() or "VALUE"
        return self.launch.open.new(f"${word}", f"it is {text[:80]}", node.lineno)

    def holds(self, node: ast.expr, scope: dict[str, Any]) -> bool:
        """Return whether a condition holds; one that is not known counts as false, with a remark."""
        value = self.value(node, scope)
        if isinstance(value, str) and is_open(value) and len(value) == 1:
            self.remark(node, f"`{ast.unparse(node)}` is not known, and taken for false", scope)
            return False
        return bool(value)

    def remark(self, node: ast.AST, text: str, scope: Mapping[str, Any]) -> None:
        """Add a remark on a line of the script itself; those on modules that it uses help nobody."""
        if scope.get("__globals__", scope).get("__name__") == "__main__":
            self.launch.remark(getattr(node, "lineno", 0), text)

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name, scope)
            case ast.Attribute():
                return self._attribute(node, scope)
            case ast.JoinedStr(values=parts):
                return "".join(self._part(part, scope) for part in parts)
            case ast.BinOp(left=left, op=op, right=right):
                return operated(op, self._value(left, scope), self._value(right, scope))
            case ast.BoolOp(op=op, values=values):
                return self._bool(values, scope, both=isinstance(op, ast.And))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._decided(operand, scope)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand, scope)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self.holds(test, scope) else orelse, scope)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compared(left, ops, others, scope)
            case ast.Call():
                return self._called(node, scope)
            case ast.Subscript(slice=ast.Constant(value=str() as key)) if ast.unparse(node.value) == "os.environ":
                return self.given.get(key) or self.launch.open.new(
                    f"${key}", "nothing sets it", node.lineno, unset=True
                )
            case ast.Subscript(value=value, slice=index):
                return self._item(self._value(value, scope), index, scope)
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                found = self._items(items, scope)
                return tuple(found) if isinstance(node, ast.Tuple) else found
            case ast.Dict(keys=keys, values=values):
                return self._dict(keys, values, scope)
            case ast.ListComp(elt=element, generators=[each]) | ast.GeneratorExp(elt=element, generators=[each]):
                return self._comprehension(element, each, scope)
            case ast.Lambda():
                return Function(node, scope)
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                scope[name] = self._value(value, scope)
                return scope[name]
        raise Unknown

    def _name(self, name: str, scope: dict[str, Any]) -> Any:
        if name in scope:
            return scope[name]
        outer = scope.get("__globals__", {})
        if name in outer:
            return outer[name]
        if name in BUILTINS or name in LIBRARY:
            return BUILTINS.get(name) or LIBRARY[name]
        raise Unknown

    def _attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        dotted = ast.unparse(node)
        if dotted in LIBRARY:
            return LIBRARY[dotted]
        owner = self._value(node.value, scope)
        if isinstance(owner, Instance):
            if node.attr in owner.values:
                return owner.values[node.attr]
            if (method := owner.kind.method(node.attr)) is not None:
                is_property = any(isinstance(each, ast.Name) and each.id == "property" for each in _decorators(method))
                bound = Function(method.node, method.scope, owner)
                return self.call(bound, [], {}, ast.Call(node, [], [])) if is_property else bound
            if node.attr in self.given:
                return literal(self.given[node.attr])
            raise Unknown
        if isinstance(owner, Module):
            return self.attribute_of_module(owner, node.attr)
        if isinstance(owner, str) and node.attr in ("parent", "name") and "/" in owner:
            return os.path.dirname(owner) if node.attr == "parent" else os.path.basename(owner)
        for kind, names in METHODS.items():
            if isinstance(owner, kind) and node.attr in names:
                return getattr(owner, node.attr)
        raise Unknown

    def _part(self, part: ast.expr, scope: dict[str, Any]) -> str:
        """Return a part of an f-string."""
        if isinstance(part, ast.Constant):
            return str(part.value)
        assert isinstance(part, ast.FormattedValue)
        value = self.value(part.value, scope)
        if isinstance(value, Instance | Function | Class | Module):
            return self.open(part.value)
        if part.format_spec is not None and not (isinstance(value, str) and is_open(value)):
            return format(value, self._value(part.format_spec, scope))
        return repr(value) if part.conversion == ord("r") else str(value)

    def _decided(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        """Return a value whose truth is known."""
        value = self._value(node, scope)
        if isinstance(value, str) and is_open(value) and len(value) == 1:
            raise Unknown
        return value

    def _bool(self, nodes: list[ast.expr], scope: dict[str, Any], *, both: bool) -> Any:
        value: Any = both
        for node in nodes:
            value = self._decided(node, scope)
            if bool(value) is not both:
                return value
        return value

    def _compared(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], scope: dict[str, Any]) -> bool:
        one = self._value(left, scope)
        for op, node in zip(ops, others, strict=True):
            other = self._value(node, scope)
            if not compared(op, one, other):
                return False
            one = other
        return True

    def _called(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        dotted = ast.unparse(node.func)
        if dotted in ("os.environ.get", "os.getenv"):
            key, *default = [self._value(argument, scope) for argument in node.args]
            return self.given.get(key, default[0] if default else None)
        args = self._items(node.args, scope)
        kwargs: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                kwargs |= self._value(keyword.value, scope)
            else:
                kwargs[keyword.arg] = self.value(keyword.value, scope, keyword.arg)
        if dotted == "json.dumps":
            return json.dumps(args[0])
        if dotted == "range":
            return list(range(*args))[:10_000]
        if dotted in ("field", "dataclasses.field"):
            factory = kwargs.get("default_factory")
            return self.call(factory, [], {}, node) if factory is not None else kwargs["default"]
        function = self._value(node.func, scope)
        if isinstance(function, Function | Class):
            return self.call(function, args, kwargs, node)
        if callable(function):
            opened = [each for each in args if isinstance(each, str) and is_open(each)]
            if opened and function in (int, float, bool, len, max, min, sum, abs, round):
                raise Unknown
            return function(*args, **kwargs)
        raise Unknown

    def _item(self, value: Any, index: ast.expr, scope: dict[str, Any]) -> Any:
        if isinstance(index, ast.Slice):
            bounds = [
                None if each is None else self._value(each, scope) for each in (index.lower, index.upper, index.step)
            ]
            return value[slice(*bounds)]
        return value[self._value(index, scope)]

    def _items(self, nodes: list[ast.expr], scope: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found.extend(self._value(node.value, scope))
            else:
                found.append(self.value(node, scope))
        return found

    def _dict(self, keys: list[ast.expr | None], values: list[ast.expr], scope: dict[str, Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(keys, values, strict=True):
            if key is None:
                merged = self.value(value, scope)
                found |= merged if isinstance(merged, dict) else {}
            else:
                found[self._value(key, scope)] = self.value(value, scope)
        return found

    def _comprehension(self, element: ast.expr, each: ast.comprehension, scope: dict[str, Any]) -> list[Any]:
        found, inner = [], dict(scope)
        for item in self._value(each.iter, scope):
            unpack(each.target, item, inner)
            if all(self.holds(test, inner) for test in each.ifs):
                found.append(self._value(element, inner))
        return found


def unpack(target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
    """Bind the names of an assignment's target."""
    if isinstance(target, ast.Name):
        scope[target.id] = value
    elif isinstance(target, ast.Tuple | ast.List):
        for each, item in zip(target.elts, value, strict=True):
            unpack(each, item, scope)


def literal(text: str) -> Any:
    """Return a value that was given as text: a number, true, false, none, or text."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _decorators(function: Function) -> list[ast.expr]:
    return function.node.decorator_list if isinstance(function.node, ast.FunctionDef) else []
