"""Reads a launch script in bash: follows its assignments up to the training program that it starts; runs nothing."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from miles.migrate.launch import Launch
from miles.migrate.open_values import is_open
from miles.migrate.shell_expansion import Expansion, line_of, printed_by, source
from miles.migrate.shell_tests import Tests
from miles.migrate.shell_tree import assigned, branch, flat, glob, of_type
from miles.migrate.shell_values import Shell

_MOST_ROUNDS = 1000
"""Rounds of a loop that are followed."""
_DEEPEST = 40
"""Calls and files within each other."""
_DECLARATIONS = ("export", "local", "declare", "readonly", "typeset")
_VARIABLE = re.compile(r"(?<!\\)\$([A-Za-z_]\w*)")
"""A variable without braces, which the grammar cuts in two when it follows a colon or a bracket."""
_CONDITIONS = ("test_command", "negated_command", "list")


def read_shell_script(path: pathlib.Path, given: Mapping[str, str]) -> Launch:
    """Return what a script launches when the variables in `given` have those values. Raises OSError."""
    script = path.resolve()
    shell = Shell(script, given, Launch(script), folder=script.parent)
    _Reader(shell).read(path)
    return shell.launch


class _Reader:
    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._expansion = Expansion(shell, self._printed)
        self._tests = Tests(shell, self._expansion)
        self._functions: dict[str, Node] = {}
        self._parser = Parser(Language(tree_sitter_bash.language()))
        self._depth = 0

    def read(self, path: pathlib.Path) -> None:
        """Follow the commands of a file."""
        text = _VARIABLE.sub(r"${\1}", path.read_text(encoding="utf-8", errors="replace"))
        self._follow(self._parser.parse(text.encode()).root_node.named_children)

    def _follow(self, nodes: Iterable[Node]) -> bool | None:
        """Follow commands; return whether the last one succeeded, None when that is not known."""
        result: bool | None = True
        for node in nodes:
            result = self._step(node)
        return result

    def _step(self, node: Node) -> bool | None:
        match node.type:
            case "variable_assignment":
                self._assign(node)
            case "variable_assignments" | "declaration_command":
                self._declare(node)
            case "command":
                return self._command(node)
            case "if_statement":
                self._if(node)
            case "for_statement":
                self._for(node)
            case "case_statement":
                self._case(node)
            case "while_statement" | "c_style_for_statement":
                self._leave_open([node], "it is set in a loop")
            case "list":
                return self._list(node)
            case "function_definition":
                self._functions[source(node.child_by_field_name("name") or node)] = node
            case "test_command" | "negated_command":
                return self._tests.holds(node)
            case "redirected_statement" | "pipeline":
                return self._follow(child for child in node.named_children if not child.type.endswith("redirect"))
            case "compound_statement" | "subshell" | "do_group" | "else_clause" | "ERROR":
                return self._follow(node.named_children)
        return True

    def _assign(self, node: Node) -> None:
        name_node, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        if name_node is None:
            return
        name, append = source(name_node), any(child.type == "+=" for child in node.children)
        if name_node.type == "subscript":
            return
        if value is not None and value.type == "array":
            words = [
                word
                for child in value.named_children
                if child.type != "comment"
                for word in self._expansion.words(child)
            ]
            self._shell.set(name, words, append=append)
        else:
            self._shell.set(name, "" if value is None else self._expansion.text(value), append=append)

    def _declare(self, node: Node) -> None:
        for child in node.named_children:
            if child.type == "variable_assignment":
                self._assign(child)
            name = child.child_by_field_name("name") if child.type == "variable_assignment" else child
            if node.children[0].type == "export" and name is not None:
                self._shell.exported.add(source(name))

    def _command(self, node: Node) -> bool | None:
        for child in node.named_children:
            if child.type == "variable_assignment":  # X=1 command
                self._assign(child)
                self._shell.exported.add(source(child.child_by_field_name("name") or child))
        parts = [
            child for child in node.named_children if child.type not in ("variable_assignment", "herestring_redirect")
        ]
        words = [word for part in parts for word in self._expansion.words(part)]
        if not words:
            return True
        name, line = words[0], line_of(node)
        if name in ("source", ".") and len(words) > 1:
            self._source(words[1], line)
        elif name in self._functions:
            self._call(self._functions[name], words[1:])
        elif name == "shift":
            del self._shell.positional[:1]
        elif name == "cd" and len(words) > 1 and not is_open(words[-1]):
            self._shell.folder = self._shell.folder / words[-1]
        elif name in ("true", ":", "false"):
            return name != "false"
        elif name == "[" or name in ("command", "which", "type"):
            return None
        elif self._shell.launch.starts(words, line):
            self._take_environment(words, line)
        return True

    def _source(self, name: str, line: int) -> None:
        """Follow another file: where the script says it is, or the one that ends in the same way beside the script."""
        open_values = self._shell.launch.open
        candidates = [] if is_open(name) else [self._shell.folder / name]
        tail = pathlib.PurePosixPath(re.split(r"[\ue000-\uf8ff]", name)[-1].lstrip("/"))
        for folder in self._shell.script.parents:
            candidates += [folder / tail, folder / "scripts" / tail, folder / "scripts/models" / tail.name]
        path = next((each for each in candidates if each.is_file()), None)
        if path is None or self._depth >= _DEEPEST:
            self._shell.launch.remark(
                line, f"{open_values.plain(name)} is not read: there is no such file near the script"
            )
            return
        self._depth += 1
        self.read(path)
        self._depth -= 1

    def _call(self, function: Node, arguments: list[str]) -> None:
        body = function.child_by_field_name("body")
        if body is None or self._depth >= _DEEPEST:
            return
        before, self._shell.positional = self._shell.positional, arguments
        self._depth += 1
        self._step(body)
        self._depth -= 1
        self._shell.positional = before

    def _list(self, node: Node) -> bool | None:
        """Follow `left && right` or `left || right`."""
        left, right = node.named_children[0], node.named_children[-1]
        both = any(child.type == "&&" for child in node.children)
        first = self._step(left)
        if first is None:
            if left.type in _CONDITIONS:
                self._leave_open([right], f"it is set only if {' '.join(source(left).split())}")
            return None
        if first is both:
            return self._step(right)
        return first

    def _if(self, node: Node) -> None:
        condition = node.child_by_field_name("condition")
        branches: list[tuple[Node | None, list[Node]]] = [(condition, branch(node, condition))]
        for child in node.named_children:
            if child.type == "elif_clause":
                branches.append((child.named_children[0], branch(child, child.named_children[0])))
            elif child.type == "else_clause":
                branches.append((None, child.named_children))
        for index, (test, body) in enumerate(branches):
            holds = True if test is None else self._step(test)
            if holds is None and test is not None:
                rest = [each for _, nodes in branches[index:] for each in nodes]
                self._leave_open(rest, f"it depends on {' '.join(source(test).split())}")
                return
            if holds:
                self._follow(body)
                return

    def _for(self, node: Node) -> None:
        variable, body = node.child_by_field_name("variable"), node.child_by_field_name("body")
        values = node.children_by_field_name("value")
        words = [word for value in values for word in self._expansion.words(value)]
        if variable is None or body is None or any(is_open(word) for word in words) or len(words) > _MOST_ROUNDS:
            self._leave_open([node], "it is set in a loop")
            return
        for word in words:
            self._shell.set(source(variable), word)
            self._step(body)

    def _case(self, node: Node) -> None:
        value = node.child_by_field_name("value")
        word = self._shell.launch.open.emptied(self._expansion.text(value)) if value is not None else ""
        items = [child for child in node.named_children if child.type == "case_item"]
        if is_open(word):
            self._leave_open(items, f"it depends on {source(value) if value is not None else ''}")
            return
        for item in items:
            patterns = item.children_by_field_name("value")
            if any(re.fullmatch(glob(self._expansion.text(pattern)), word) for pattern in patterns):
                self._follow(child for child in item.named_children if child not in patterns)
                return

    def _leave_open(self, nodes: Sequence[Node], why: str) -> None:
        """Leave open what commands would set, which are not followed."""
        for name, line in assigned(nodes):
            self._shell.leave_open(name, why, line)
        for node in nodes:
            for command in of_type(node, "command"):
                words = [source(child) for child in command.named_children]
                if (
                    any(word.endswith(("train.py", "train_async.py")) for word in words)
                    and not self._shell.launch.program
                ):
                    self._command(command)
                    self._shell.launch.remark(line_of(command), f"training is started here, but {why}")

    def _printed(self, node: Node) -> str | None:
        """Return what $(…) prints, when its commands only compute text."""
        if (text := self._here_document(node)) is not None:
            return text
        folder, printed = self._shell.folder, None
        for child in flat(node.named_children):
            if child.type != "command":
                return None
            words = [word for part in child.named_children for word in self._expansion.words(part)]
            if any(is_open(word) for word in words):
                printed = None
            elif words[:1] == ["cd"] and len(words) > 1:
                self._shell.folder = self._shell.folder / words[-1]
            else:
                printed = printed_by(words, self._shell)
        self._shell.folder = folder
        return printed

    def _here_document(self, node: Node) -> str | None:
        """Return the text of $(cat <<END …), or None for another substitution."""
        inside = node.named_children[0] if len(node.named_children) == 1 else node
        body = next(iter(of_type(inside, "heredoc_body")), None)
        if inside.type != "redirected_statement" or source(inside.named_children[0]) != "cat" or body is None:
            return None
        quoted = any("'" in source(start) or '"' in source(start) for start in of_type(inside, "heredoc_start"))
        return source(body) if quoted else self._expansion.joined(body)

    def _take_environment(self, words: Sequence[str], line: int) -> None:
        """Take the variables that the program gets: those exported, and those of Ray's --runtime-env-json."""
        launch = self._shell.launch
        launch.environment = {name: self._shell.text(name, line) for name in sorted(self._shell.exported)}
        text = next((word.partition("=")[2] for word in words if word.startswith("--runtime-env-json=")), "")
        if not text and "--runtime-env-json" in words[:-1]:
            text = words[words.index("--runtime-env-json") + 1]
        if text:
            try:
                given = json.loads(text).get("env_vars", {})
            except (ValueError, AttributeError):
                launch.remark(line, "the JSON of --runtime-env-json is not read: it is none")
                return
            launch.environment |= {str(name): str(value) for name, value in given.items()}
