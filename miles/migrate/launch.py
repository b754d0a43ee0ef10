"""What a launch script starts."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from miles.migrate.open_values import OpenValues

_PROGRAM = re.compile(r"(?:.*/)?(train\w*)\.py")


@dataclasses.dataclass(frozen=True, slots=True)
class Remark:
    """What could not be evaluated, or how it was."""

    line: int
    """Line of the script, from 1; 0 for the script as a whole."""
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


@dataclasses.dataclass(slots=True)
class Launch:
    """The training program of a script, with its words."""

    script: pathlib.Path

    program: str = ""
    """Name of the program, e.g. train_async; empty when the script starts none."""
    words: list[str] = dataclasses.field(default_factory=list)
    """Its arguments; some may be open."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    open: OpenValues = dataclasses.field(default_factory=OpenValues)

    def find(self, name: str) -> pathlib.Path | None:
        """Return the file that a script names from the folder where it is started: the first above the script."""
        return next((folder / name for folder in self.script.parents if (folder / name).is_file()), None)

    def remark(self, line: int, text: str) -> None:
        """Add a remark, once."""
        if (remark := Remark(line, text)) not in self.remarks:
            self.remarks.append(remark)

    def starts(self, words: Sequence[str], line: int) -> bool:
        """Take a command when it starts a training program; of several, the last one counts."""
        for index, word in enumerate(words):
            if (match := _PROGRAM.fullmatch(word)) is not None and not word.startswith("-"):
                if self.program:
                    self.remark(line, "the script starts training more than once; the last command is taken")
                self.program, self.words = match[1], list(words[index + 1 :])
                return True
        return False
