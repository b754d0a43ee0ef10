"""Expands words of a shell script: quotes, variables, arrays, arithmetic, and a few commands that print text."""

from __future__ import annotations

import fnmatch
import os.path
import re
from collections.abc import Callable

from tree_sitter import Node

from miles.migrate.open_values import is_open
from miles.migrate.shell_values import Shell

Substitute = Callable[[Node], str | None]
"""Gives what a command substitution prints, or None when that is not known."""

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_QUOTED_ESCAPE = re.compile(r'\\([\\"$`\n])')


def line_of(node: Node) -> int:
    return node.start_point.row + 1


def source(node: Node) -> str:
    return node.text.decode() if node.text is not None else ""


class Expansion:
    """Expands the words of a script with its variables."""

    def __init__(self, shell: Shell, substitute: Substitute) -> None:
        self._shell = shell
        self._substitute = substitute

    def words(self, node: Node) -> list[str]:
        """Return the words that one word of the script becomes: an unquoted variable may be several, or none."""
        if (
            node.type == "string"
            and len(node.named_children) == 1
            and (items := self._array(node.named_children[0])) is not None
        ):
            return items
        if node.type in ("expansion", "simple_expansion", "command_substitution"):
            items = self._array(node)
            pieces = items if items is not None else [self.text(node)]
            return [word for piece in pieces for word in piece.split()] if items is None else pieces
        if node.type == "brace_expression":
            return [source(node)]
        return [self.text(node)]

    def text(self, node: Node) -> str:
        """Return what a word is as one text."""
        match node.type:
            case "string":
                return self._string(node)
            case "raw_string":
                return source(node)[1:-1]
            case "ansi_c_string":
                return source(node)[2:-1].encode().decode("unicode_escape")
            case "concatenation" | "command_name" | "variable_name" if node.named_children:
                return self.joined(node)
            case "simple_expansion" | "expansion":
                return self._expansion(node)
            case "command_substitution":
                printed = self._substitute(node)
                if printed is not None:
                    return printed
                return self._shell.launch.open.new(source(node), "it is what a command prints", line_of(node))
            case "arithmetic_expansion":
                return self._arithmetic(node)
        return _ESCAPE.sub(lambda match: "" if match[1] == "\n" else match[1], source(node))

    def joined(self, node: Node) -> str:
        """Join the children, with the text between them that the grammar names nothing for."""
        text, at = "", node.start_byte
        whole = node.text or b""
        for child in node.children:
            text += whole[at - node.start_byte : child.start_byte - node.start_byte].decode()
            text += self.text(child)
            at = child.end_byte
        return text

    def _string(self, node: Node) -> str:
        text, whole, at = "", node.text or b"", node.start_byte + 1
        for child in node.children[1:-1]:
            text += _unescaped(whole[at - node.start_byte : child.start_byte - node.start_byte].decode())
            text += (
                _unescaped(source(child)) if child.type == "string_content" or not child.is_named else self.text(child)
            )
            at = child.end_byte
        return text + _unescaped(whole[at - node.start_byte : -1].decode())

    def _array(self, node: Node) -> list[str] | None:
        """Return the elements when a node expands a whole array, else None."""
        match = re.fullmatch(r"\$\{(\w+)\[[@*]\]\}|\$([@*])", source(node))
        if match is None:
            return None
        name = match[1] or match[2]
        value = self._shell.get(name, line_of(node))
        return list(value) if isinstance(value, list) else ([value] if self._shell.is_set(name) and value else [])

    def _expansion(self, node: Node) -> str:
        line, text = line_of(node), source(node)
        if (items := self._array(node)) is not None:
            return " ".join(items)
        if (match := re.fullmatch(r"\$\{#(\w+)\[[@*]\]\}", text)) is not None:
            value = self._shell.get(match[1], line)
            return str(len(value)) if isinstance(value, list) else "1"
        if (match := re.fullmatch(r"\$\{?(\w+|[@*#?])\}?", text)) is not None:
            return self._shell.text(match[1], line)
        if (match := re.fullmatch(r"\$\{(\w+)\[(\w+)\]\}", text)) is not None:
            return self._element(match[1], match[2], line)
        match = re.match(r"\$\{(\w+)(:?[-+=?]|%%?|##?|,,|\^\^)", text)
        if match is None:
            return self._shell.launch.open.new(text, "such an expansion is not evaluated", line)
        operator = next(child for child in node.children if source(child) == match[2])
        rest = node.children[node.children.index(operator) + 1 : -1]
        return self._operated(match[1], match[2], "".join(self.text(child) for child in rest), line)

    def _element(self, name: str, index: str, line: int) -> str:
        value = self._shell.get(name, line)
        if isinstance(value, str):
            return value if index == "0" else ""
        position = int(index) if index.isdigit() else len(value)
        return value[position] if position < len(value) else ""

    def _operated(self, name: str, operator: str, operand: str, line: int) -> str:
        """Return ${name<operator>operand}."""
        known, value = self._shell.is_set(name), self._shell.text(name, line)
        if operator[-1] in "-+=?":
            missing = not known or (operator[0] == ":" and value == "")
            if name.isdigit():
                missing = int(name) > len(self._shell.positional)
            if operator[-1] == "+":
                return "" if missing else operand
            if missing and operator[-1] == "=":
                self._shell.set(name, operand)
            return operand if missing and operator[-1] in "-=" else value
        if operator in (",,", "^^"):
            return value.lower() if operator == ",," else value.upper()
        return _stripped(value, operator, operand)

    def _arithmetic(self, node: Node) -> str:
        """Evaluate $((…)) of whole numbers, variables, and + - * / % and parentheses."""
        text, line = source(node)[3:-2], line_of(node)
        names = re.sub(
            r"\$\{?([A-Za-z_]\w*)\}?|\b([A-Za-z_]\w*)\b", lambda m: self._shell.text(m[1] or m[2], line), text
        )
        value = None if is_open(names) else calculated(names)
        return (
            self._shell.launch.open.new(source(node), "not all numbers in it are known", line)
            if value is None
            else str(value)
        )


def calculated(text: str) -> int | None:
    """Return the value of an arithmetic expression of whole numbers, or None for another one."""
    if re.fullmatch(r"[\d\s+*/%()-]+", text) is None:
        return None
    tokens = re.findall(r"\d+|[+*/%()-]", text)
    try:
        value = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value


def _sum(tokens: list[str]) -> int:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        value = value + _product(tokens) if tokens.pop(0) == "+" else value - _product(tokens)
    return value


def _product(tokens: list[str]) -> int:
    value = _factor(tokens)
    while tokens and tokens[0] in "*/%":
        operator, other = tokens.pop(0), _factor(tokens)
        value = value * other if operator == "*" else (value // other if operator == "/" else value % other)
    return value


def _factor(tokens: list[str]) -> int:
    token = tokens.pop(0)
    if token == "-":
        return -_factor(tokens)
    if token == "(":
        value = _sum(tokens)
        tokens.remove(")")
        return value
    return int(token)


def _stripped(value: str, operator: str, pattern: str) -> str:
    """Return a value without its end (%) or beginning (#) that a pattern matches, the shortest or (%%, ##) longest."""
    ends = (
        [value[i:] for i in range(len(value), -1, -1)]
        if operator[0] == "%"
        else [value[:i] for i in range(len(value) + 1)]
    )
    for part in reversed(ends) if len(operator) == 2 else ends:
        if fnmatch.fnmatchcase(part, pattern):
            return value[: len(value) - len(part)] if operator[0] == "%" else value[len(part) :]
    return value


def _unescaped(text: str) -> str:
    return _QUOTED_ESCAPE.sub(lambda match: "" if match[1] == "\n" else match[1], text)


def printed_by(words: list[str], shell: Shell) -> str | None:
    """Return what a command prints, of the few that only compute text; None for any other."""
    name, arguments = (words[0], [word for word in words[1:] if word != "--"]) if words else ("", [])
    match name, arguments:
        case "pwd", _:
            return str(shell.folder)
        case "dirname", [path]:
            return os.path.dirname(path) or "."
        case "basename", [path, *suffix]:
            base = os.path.basename(path.rstrip("/"))
            return base.removesuffix(suffix[0]) if suffix else base
        case (("realpath" | "readlink"), [*_, path]):
            return os.path.normpath(shell.folder / path)
        case "echo", _ if not arguments or not arguments[0].startswith("-"):
            return " ".join(arguments)
        case "printf", ["%s" | "%s\\n", text]:
            return text
        case "seq", _ if 1 <= len(arguments) <= 3 and all(re.fullmatch(r"-?\d+", each) for each in arguments):
            first, step, last = _range([int(each) for each in arguments])
            stop = last + (1 if step > 0 else -1)
            return "\n".join(str(each) for each in range(first, stop, step)) if step else None
    return None


def _range(numbers: list[int]) -> tuple[int, int, int]:
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    return (numbers[0], 1, numbers[1]) if len(numbers) == 2 else (1, 1, numbers[0])
