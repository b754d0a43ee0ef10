"""Functions, classes and patterns of a launch script in Python: how they are called, built and matched."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from miles.migrate.launch import Launch
from miles.migrate.python_expressions import Expressions, literal
from miles.migrate.python_values import Class, Function, Instance, Returned, Unknown

_DEEPEST = 30
"""Calls within each other."""


class Objects(Expressions):
    """Calls functions and builds objects; statements are left to who inherits from it."""

    def __init__(self, launch: Launch, given: Mapping[str, str]) -> None:
        super().__init__(launch, given)
        self._depth = 0

    def run(self, nodes: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        """Follow statements."""
        raise NotImplementedError

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
        if isinstance(function, Class):
            names = list(function.all_fields())
            return self.instance(function, dict(zip(names, args, strict=False)) | kwargs)
        if isinstance(function, Function):
            return self.invoke(function, args, kwargs)
        return function(*args, **kwargs)

    def class_of(self, node: ast.ClassDef, scope: dict[str, Any]) -> Class:
        outer = scope.get("__globals__", scope)
        bases = [self.value(base, scope) for base in node.bases]
        found = Class(node.name, {}, {}, [each for each in bases if isinstance(each, Class)], True, outer)
        found.complete = len(found.bases) == len(bases)
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                found.fields[each.target.id] = each.value
            elif isinstance(each, ast.FunctionDef):
                found.methods[each.name] = Function(each, outer)
        return found

    def instance(self, kind: Class, values: dict[str, Any]) -> Instance:
        instance = Instance(kind, {})
        for name, (default, scope) in kind.all_fields().items():
            if name in values:
                instance.values[name] = values[name]
            elif name in self.given:
                instance.values[name] = literal(self.given[name])
            elif default is not None:
                instance.values[name] = self.value(default, scope, name)
            else:
                instance.values[name] = self.launch.open.new(f"${name.upper()}", "it is an argument of the script", 0)
        if not kind.complete:
            instance.values.setdefault("num_nodes", literal(self.given.get("num_nodes", "1")))
        method = kind.method("__post_init__")
        if method is not None:
            self.invoke(Function(method.node, method.scope, instance), [], {})
        return instance

    def invoke(self, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if self._depth >= _DEEPEST:
            raise Unknown
        scope = {"__globals__": function.scope, **self._bound(function, args, kwargs)}
        self._depth += 1
        try:
            if isinstance(function.node, ast.Lambda):
                return self.value(function.node.body, scope)
            self.run(function.node.body, scope)
        except Returned as returned:
            return returned.value
        finally:
            self._depth -= 1
        return None

    def _bound(self, function: Function, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind the arguments of a call."""
        arguments = function.node.args
        names = [each.arg for each in arguments.args]
        if function.bound is not None:
            args = [function.bound, *args]
        scope = dict(zip(names, args, strict=False))
        if arguments.kwarg is not None:
            known = {*names, *(each.arg for each in arguments.kwonlyargs)}
            scope[arguments.kwarg.arg] = {key: value for key, value in kwargs.items() if key not in known}
        if arguments.vararg is not None:
            scope[arguments.vararg.arg] = tuple(args[len(names) :])
        scope |= kwargs
        defaults = zip(names[len(names) - len(arguments.defaults) :], arguments.defaults, strict=True)
        only = zip((each.arg for each in arguments.kwonlyargs), arguments.kw_defaults, strict=True)
        for name, default in [*defaults, *only]:
            if name not in scope and default is not None:
                scope[name] = self.value(default, function.scope)
        return scope

    def matches(self, pattern: ast.pattern, value: Any, scope: dict[str, Any]) -> bool:
        match pattern:
            case ast.MatchValue(value=expected):
                return bool(self.value(expected, scope) == value)
            case ast.MatchSingleton(value=constant):
                return value is constant
            case ast.MatchOr(patterns=patterns):
                return any(self.matches(each, value, scope) for each in patterns)
            case ast.MatchSequence(patterns=patterns):
                if not isinstance(value, list | tuple) or len(value) != len(patterns):
                    return False
                return all(self.matches(each, item, scope) for each, item in zip(patterns, value, strict=True))
            case ast.MatchAs(pattern=inner, name=name):
                if inner is not None and not self.matches(inner, value, scope):
                    return False
                if name is not None:
                    scope[name] = value
                return True
        return False
