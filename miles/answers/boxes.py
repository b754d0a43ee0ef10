r"""The `\boxed{...}` answers of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
_JOINT = re.compile(r"(?:[\s$]++|\\[\](),;]|,|;|\\text\s*+\{|\}|\band\b|\bor\b)*+")
"""What may stand between joined boxes; it never goes back, so that its time is linear."""
_WORD = re.compile(r"[^\s$]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxes(text: str) -> list[str] | None:
    r"""Return the last box's content, behind those that only a comma, "and" or "or" joins to it.

    An empty list when there is no box. None when the last box is never closed, as in a response that was cut.
    Boxes in a box are unpacked; empty boxes, which only name the form, do not count.
    """
    joined: list[str] | None = []
    behind = 0
    for start, end, content in _boxes(text):
        if content is None:
            joined = None
        elif not content.strip():
            continue
        elif joined and _JOINT.fullmatch(text, behind, start):
            joined.append(content)
        else:
            joined = [content]
        behind = end
    return joined


def without_boxes(text: str) -> str:
    r"""Return the text with every closed `\boxed{x}` replaced by x."""
    closing = _closing_braces(text)
    opened = [found for found in _BOX.finditer(text) if found.end() in closing]
    cuts = [(found.start(), found.end() + 1) for found in opened]
    cuts += [(closing[found.end()], closing[found.end()] + 1) for found in opened]
    parts, behind = [], 0
    for start, end in sorted(cuts):
        parts.append(text[behind:start])
        behind = end
    return "".join([*parts, text[behind:]])


def _boxes(text: str) -> Iterator[tuple[int, int, str | None]]:
    """Yield start, end and content of each outermost box; a box that is not closed has no content."""
    closing = _closing_braces(text)
    position = 0
    while found := _BOX.search(text, position):
        position = found.end()
        if text[position] != "{":  # \boxed 3
            bare = _WORD.match(text, position)
            assert bare is not None, "the pattern looks ahead to it"
            position = bare.end()
            yield found.start(), position, bare[0].rstrip(".,;")
        elif position in closing:
            inside = text[position + 1 : closing[position]]
            position = closing[position] + 1
            yield found.start(), position, without_boxes(inside)
        else:
            yield found.start(), position, None


def _closing_braces(text: str) -> dict[int, int]:
    """Return the position of the closing brace by that of its opening one, for those that are closed."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing
