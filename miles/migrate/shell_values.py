"""The variables of a shell script while it is evaluated."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from miles.migrate.launch import Launch

Value = str | list[str]
"""Text, or an array."""


@dataclasses.dataclass(slots=True)
class Shell:
    """The state of a script: variables, functions, the working folder, and what it launches."""

    script: pathlib.Path
    fixed: Mapping[str, str]
    """Variables that were given from outside; assignments do not change them."""
    launch: Launch
    variables: dict[str, Value] = dataclasses.field(default_factory=dict)
    exported: set[str] = dataclasses.field(default_factory=set)
    positional: list[str] = dataclasses.field(default_factory=list)
    folder: pathlib.Path = pathlib.Path()

    def is_set(self, name: str) -> bool:
        return name in self.fixed or name in self.variables

    def get(self, name: str, line: int) -> Value:
        """Return a variable; one that nothing sets is open."""
        if name in self.fixed:
            return self.fixed[name]
        if name in self.variables:
            return self.variables[name]
        if name.isdigit() and 0 < int(name) <= len(self.positional):
            return self.positional[int(name) - 1]
        match name:
            case "0" | "BASH_SOURCE":
                return str(self.script)
            case "PWD":
                return str(self.folder)
            case "@" | "*":
                return list(self.positional)
            case "#":
                return str(len(self.positional))
            case "?":
                return "0"
        return self.launch.open.new(
            f"${name}" if name.isidentifier() else f"${{{name}}}", "nothing sets it", line, unset=True
        )

    def text(self, name: str, line: int) -> str:
        """Return a variable as one text; of an array it is the first element."""
        value = self.get(name, line)
        return value if isinstance(value, str) else (value[0] if value else "")

    def set(self, name: str, value: Value, *, append: bool = False) -> None:
        """Assign a variable, unless it was given from outside."""
        if name in self.fixed:
            return
        before = self.variables.get(name, [] if isinstance(value, list) else "")
        if not append:
            self.variables[name] = value
        elif isinstance(before, str) and isinstance(value, str):
            self.variables[name] = before + value
        else:
            both = [[each] if isinstance(each, str) else each for each in (before, value)]
            self.variables[name] = [*both[0], *both[1]]

    def leave_open(self, name: str, why: str, line: int) -> None:
        """Note that only a run of the script knows a variable."""
        value = self.launch.open.new(f"${name}", why, line)
        self.set(name, [value] if isinstance(self.variables.get(name), list) else value)
