"""Finds things in the syntax tree of a shell script."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tree_sitter import Node

from miles.migrate.shell_expansion import line_of, source


def branch(node: Node, condition: Node | None) -> list[Node]:
    """Return the commands of an if or elif after its condition."""
    skipped = ("elif_clause", "else_clause", "comment")
    return [child for child in node.named_children if child != condition and child.type not in skipped]


def flat(nodes: Iterable[Node]) -> Iterable[Node]:
    """Yield the commands of a substitution, one after the other; pipelines as they are."""
    for node in nodes:
        if node.type in ("list", "redirected_statement", "compound_statement"):
            yield from flat(node.named_children)
        elif not node.type.endswith("redirect") and node.type != "comment":
            yield node


def of_type(node: Node, kind: str) -> Iterable[Node]:
    if node.type == kind:
        yield node
    for child in node.named_children:
        yield from of_type(child, kind)


def assigned(nodes: Iterable[Node]) -> list[tuple[str, int]]:
    """Return the variables that commands set, with the lines."""
    assignments = [each for node in nodes for each in of_type(node, "variable_assignment")]
    named = ((source(each.child_by_field_name("name") or each), line_of(each)) for each in assignments)
    first: dict[str, int] = {}
    for name, line in named:
        first.setdefault(name, line)
    return [(name, line) for name, line in first.items() if name.isidentifier()]


def glob(pattern: str) -> str:
    return "".join(".*" if letter == "*" else "." if letter == "?" else re.escape(letter) for letter in pattern)
