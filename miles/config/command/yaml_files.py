"""Reads and writes YAML files of settings: one flat mapping in which every key is unique.

Plain words mean what they mean on the command line: 1e-6 is a number, and yes, 010, 1:30 and 2026-11-29 are text, which
each setting reads as it reads a flag's value. (YAML 1.1, which PyYAML follows, makes text, a switch, octal 8, 90 and a
date of them.)
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from miles.config.schema.faults import Fault

_DEEPEST = 20
"""Levels of lists and mappings. PyYAML calls itself once a level."""
_PLAIN_WORDS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Tag, the words that have it, and the characters that they begin with: the core schema of YAML 1.2, decimals alone."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would silently keep the last, and what no file of settings needs."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) and not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
            raise _refused(event, f"*{event.anchor} stands for a list or mapping; write it out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _refused(event, "lists and mappings are nested too deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key_node.value} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan"))


def _refused(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that the loader would read as something else."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _words, _first in _PLAIN_WORDS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_words})$"), [*_first, ""])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def read_file(path: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the settings of a YAML (or JSON) file, and the faults of the file itself."""
    try:
        content = parse_yaml(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        return {}, [Fault("--config", path, f"it cannot be read ({error.strerror})", "check the path")]
    except UnicodeDecodeError:
        return {}, [Fault("--config", path, "it is not UTF-8 text", "give a YAML file")]
    except yaml.YAMLError as error:
        remedy = "indent with spaces" if "found character '\\t'" in str(error) else "correct it"
        return {}, [Fault("--config", path, f"it is not YAML of settings: {_problem(error)}", remedy)]
    except ValueError as error:  # a word with a tag that it does not fit, such as !!int x
        return {}, [Fault("--config", path, f"it is not YAML of settings: {error}", "leave tags out")]
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [Fault("--config", path, "it must map setting names to values", "write lines like lr: 1.0e-6")]
    faults = [
        Fault("--config", path, f"its key {key!r} is not text", "use setting names as keys")
        for key in content
        if not isinstance(key, str)
    ]
    return {key: value for key, value in content.items() if isinstance(key, str)}, faults


def parse_yaml(text: str) -> Any:
    """Return what YAML (or JSON) text holds. Raises yaml.YAMLError, and ValueError for a tag that does not fit."""
    return yaml.load(text, Loader=_Loader)


def write_text(document: Mapping[str, Any]) -> str:
    """Return a document as YAML that `read_file` reads as it was, without a break in any line."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text


def _problem(error: yaml.YAMLError) -> str:
    """The error on one line, with its place in the file, without the excerpt that PyYAML adds."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None and error.problem_mark is not None:
        what = f"{error.context}: {error.problem}" if error.context else error.problem
        return f"{what}, in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())
