"""Decides the conditions of a shell script: [ … ], [[ … ]] and (( … )), where what they compare is known."""

from __future__ import annotations

import fnmatch
import operator
import pathlib
from collections.abc import Callable, Mapping

from tree_sitter import Node

from miles.migrate.open_values import is_open
from miles.migrate.shell_expansion import Expansion, calculated, source
from miles.migrate.shell_values import Shell

_NUMBERS: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Tests:
    """Decides conditions; None is neither true nor false but unknown. A variable that nothing sets is empty."""

    def __init__(self, shell: Shell, expansion: Expansion) -> None:
        self._shell = shell
        self._expansion = expansion

    def holds(self, node: Node) -> bool | None:
        """Return whether a test command, or a part of one, holds."""
        match node.type:
            case "test_command" | "parenthesized_expression":
                inside = node.named_children
                return self._inside(inside, numbers=source(node).startswith("((")) if inside else None
            case "negated_command":
                return _inverted(self.holds(node.named_children[-1]))
            case "unary_expression":
                return self._unary(node)
            case "binary_expression":
                return self._binary(node)
        value = self._known(node)
        return None if value is None else value != ""

    def _inside(self, nodes: list[Node], *, numbers: bool) -> bool | None:
        if numbers and len(nodes) == 1 and nodes[0].type != "binary_expression":
            value = self._number(nodes[0])
            return None if value is None else value != 0
        return self.holds(nodes[0]) if len(nodes) == 1 else None

    def _known(self, node: Node) -> str | None:
        """Return the text of an operand, or None when a part of it is not known."""
        text = self._shell.launch.open.emptied(self._expansion.text(node))
        return None if is_open(text) else text

    def _number(self, node: Node) -> int | None:
        text = self._known(node)
        if text is not None and node.type in ("variable_name", "word") and not text.lstrip("-").isdigit():
            text = self._shell.launch.open.emptied(self._shell.text(text, 0)) or "0"
        return None if text is None or is_open(text) else calculated(text or "0")

    def _unary(self, node: Node) -> bool | None:
        sign = source(node.children[0])
        if sign == "!":
            return _inverted(self.holds(node.named_children[-1]))
        operand = node.children[-1]
        if sign == "-v":
            return self._shell.is_set(source(operand))
        value = self._known(operand)
        if value is None:
            return None
        match sign:
            case "-z" | "-n":
                return (value == "") == (sign == "-z")
            case "-f" | "-e" | "-d" | "-s" if value:
                path = self._shell.folder / value
                beside = pathlib.Path(self._shell.script).resolve().parent
                return path.exists() if path.resolve().is_relative_to(beside.parent) else None
        return None

    def _binary(self, node: Node) -> bool | None:
        left, sign, right = node.children[0], source(node.children[1]), node.children[-1]
        if sign in ("&&", "||", "-a", "-o"):
            return _combined(self.holds(left), self.holds(right), both=sign in ("&&", "-a"))
        if sign in ("=", "==", "!=", "=~") and sign != "=~":
            one, other = self._known(left), self._known(right)
            if one is None or other is None:
                return None
            same = fnmatch.fnmatchcase(one, other) if source(right)[:1] not in "'\"" else one == other
            return same != (sign == "!=")
        if sign in _NUMBERS:
            first, second = self._number(left), self._number(right)
            return None if first is None or second is None else _NUMBERS[sign](first, second)
        return None


def _inverted(value: bool | None) -> bool | None:
    return None if value is None else not value


def _combined(left: bool | None, right: bool | None, *, both: bool) -> bool | None:
    if (not both) in (left, right):
        return not both
    return None if None in (left, right) else both
