"""What a launch script in Python computes with: functions, dataclasses and modules that are read and never run."""

from __future__ import annotations

import ast
import base64
import dataclasses
import os.path
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of the script."""

    node: ast.FunctionDef | ast.Lambda
    scope: dict[str, Any]
    """The globals of its module."""
    bound: Any = None
    """The instance of a method."""


@dataclasses.dataclass(slots=True, eq=False)
class Class:
    """A dataclass of the script: fields with the expressions of their defaults, and methods."""

    name: str
    fields: dict[str, ast.expr | None]
    methods: dict[str, Function]
    bases: list[Class]
    complete: bool
    """Whether all of its bases are known."""
    scope: dict[str, Any]

    def all_fields(self) -> dict[str, tuple[ast.expr | None, dict[str, Any]]]:
        """Return the fields with those of the bases, each with its default and the globals to evaluate it in."""
        found: dict[str, tuple[ast.expr | None, dict[str, Any]]] = {}
        for base in self.bases:
            found |= base.all_fields()
        return found | {name: (default, self.scope) for name, default in self.fields.items()}

    def method(self, name: str) -> Function | None:
        """Return a method, of the class or the nearest base."""
        return self.methods.get(name) or next(filter(None, (base.method(name) for base in self.bases)), None)


@dataclasses.dataclass(slots=True, eq=False)
class Instance:
    """An object of such a class."""

    kind: Class
    values: dict[str, Any]


@dataclasses.dataclass(slots=True, eq=False)
class Module:
    """A module by its name, whose file is read when something of it is used."""

    name: str


BUILTINS: Mapping[str, Callable[..., Any]] = {
    name: function
    for name, function in vars(__import__("builtins")).items()
    if name
    in [
        "str",
        "int",
        "float",
        "bool",
        "len",
        "max",
        "min",
        "list",
        "tuple",
        "dict",
        "set",
        "sorted",
        "sum",
        "any",
        "all",
        "enumerate",
        "zip",
        "abs",
        "round",
        "repr",
    ]
}
"""Functions of Python that only compute."""

METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        [
            "strip",
            "lstrip",
            "rstrip",
            "split",
            "join",
            "replace",
            "lower",
            "upper",
            "startswith",
            "endswith",
            "removesuffix",
            "removeprefix",
            "format",
            "title",
            "encode",
        ]
    ),
    dict: frozenset(["get", "items", "keys", "values", "update", "setdefault", "copy", "pop"]),
    list: frozenset(["append", "extend", "insert", "index", "count", "copy"]),
    tuple: frozenset(["index", "count"]),
    bytes: frozenset(["decode"]),
    re.Match: frozenset(["group", "groups"]),
}
"""Methods that are called, by the type of what they belong to."""

LIBRARY: Mapping[str, Callable[..., Any]] = {
    "os.path.join": os.path.join,
    "os.path.basename": os.path.basename,
    "os.path.dirname": os.path.dirname,
    "os.path.abspath": os.path.normpath,
    "os.path.realpath": os.path.normpath,
    "os.path.normpath": os.path.normpath,
    "base64.b64encode": base64.b64encode,
    "re.search": re.search,
    "re.match": re.match,
    "re.fullmatch": re.fullmatch,
    "shlex.quote": shlex.quote,
    "shlex.join": shlex.join,
    "Path": lambda *parts: os.path.join(*parts) if parts else ".",
    "pathlib.Path": lambda *parts: os.path.join(*parts) if parts else ".",
}
"""Functions of the standard library that only compute, by their names."""


class Returned(Exception):
    """A function returned."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class LoopControl(Exception):
    """A loop was left, or went on."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word


class Stopped(Exception):
    """The script raised an error, or ended."""


class Unknown(Exception):
    """An expression that is not evaluated."""
