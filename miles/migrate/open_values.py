"""Text with parts that only a run of the script would know, such as $BASE_DIR.

Each such part is one character of Unicode's private use area in an ordinary string: text can be joined and split.
"""

from __future__ import annotations

import dataclasses
import re
import shlex

_FIRST, _LAST = 0xE000, 0xF8FF
_OPEN = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_SPECIAL = re.compile(r'([\\"$`])')


@dataclasses.dataclass(frozen=True, slots=True)
class OpenValue:
    """A part that is not known."""

    shell: str
    """What a shell would put in its place, e.g. $BASE_DIR."""
    why: str
    line: int
    unset: bool = False
    """Whether it is a variable that nothing sets, so that tests take it for empty."""


class OpenValues:
    """The open parts of one script."""

    def __init__(self) -> None:
        self._values: list[OpenValue] = []

    def new(self, shell: str, why: str, line: int, *, unset: bool = False) -> str:
        """Return the character that stands for an open value."""
        value = OpenValue(shell, why, line, unset)
        if value not in self._values:
            self._values.append(value)
        return chr(min(_FIRST + self._values.index(value), _LAST))

    def of(self, text: str) -> list[OpenValue]:
        """Return the open values in a text, in their order."""
        return [self._values[ord(match[0]) - _FIRST] for match in _OPEN.finditer(text)]

    def written(self, text: str) -> str:
        """Return a word as a shell reads it, with what is open as variables in double quotes."""
        if not is_open(text):
            return shlex.quote(text)
        return '"' + _OPEN.sub(lambda match: self.of(match[0])[0].shell, _SPECIAL.sub(r"\\\1", text)) + '"'

    def plain(self, text: str) -> str:
        """Return a text with what is open as variables, for people and files."""
        return _OPEN.sub(lambda match: self.of(match[0])[0].shell, text)

    def emptied(self, text: str) -> str:
        """Return a text without the variables that nothing sets."""
        return _OPEN.sub(lambda match: "" if self.of(match[0])[0].unset else match[0], text)


def is_open(text: str) -> bool:
    """Whether a part of the text is not known."""
    return _OPEN.search(text) is not None
