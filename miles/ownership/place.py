"""Where a path leads, so that two ways to write the same folder are seen to be one."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import string

STEP = "\ue000"
"""Stands for the step in the path of a pattern such as hf/{rollout_id}."""
_SPEC = re.compile(r"0?\d*d?")

FileId = tuple[int, int]
"""Device and inode."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A path without links, and the folders above it that exist."""

    path: pathlib.Path
    """Absolute; STEP stands for any number."""
    above: tuple[tuple[FileId, tuple[str, ...]], ...]
    """Itself and every folder above that exists, the nearest first, each with the parts from there to the path."""

    def lies_in(self, other: Place) -> bool:
        """Return whether this is the other place or somewhere below it, also by way of a bind mount."""
        folder, rest = other.above[0]
        return any(folder == mine and _begins(parts, rest) for mine, parts in self.above)

    def meets(self, other: Place) -> bool:
        """Return whether one of the two is, or lies in, the other."""
        return self.lies_in(other) or other.lies_in(self)

    def is_same(self, other: Place) -> bool:
        """Return whether both are one folder."""
        return self.lies_in(other) and other.lies_in(self)

    def __str__(self) -> str:
        return str(self.path).replace(STEP, "{rollout_id}")


def locate(path: str | os.PathLike[str]) -> Place:
    """Follow a path as far as it exists. Raises ValueError for text that cannot be a path."""
    real = pathlib.Path(os.path.realpath(path))
    above: list[tuple[FileId, tuple[str, ...]]] = []
    for folder in (real, *real.parents):
        try:
            state = folder.stat()
        except OSError:
            continue  # it does not exist, or cannot: its name is too long, or a file is above it
        above.append(((state.st_dev, state.st_ino), real.parts[len(folder.parts) :]))
    return Place(real, tuple(above))


def locate_pattern(pattern: str) -> Place:
    """Do the same for a path in which {rollout_id} stands for a step; raises ValueError for another placeholder."""
    return locate(stepless(pattern))


def stepless(pattern: str) -> str:
    """Return the path with STEP for each {rollout_id}. Raises ValueError for other placeholders."""
    text = ""
    for literal, field, spec, conversion in string.Formatter().parse(pattern):
        text += literal
        if field is None:
            continue
        if field != "rollout_id" or conversion or not _SPEC.fullmatch(spec or ""):
            raise ValueError(f"{{{field}}} is not a placeholder; {{rollout_id}} is the only one")
        text += STEP
    return text


def _begins(parts: tuple[str, ...], start: tuple[str, ...]) -> bool:
    return len(parts) >= len(start) and all(_matches(a, b) for a, b in zip(parts, start, strict=False))


def _matches(a: str, b: str) -> bool:
    """Return whether two names may be one, for some steps."""
    return a == b or _names_of(a, b) or _names_of(b, a)


def _names_of(pattern: str, name: str) -> bool:
    if STEP not in pattern:
        return False
    numbers = r"\d+".join(map(re.escape, pattern.split(STEP)))
    return re.fullmatch(numbers, name.replace(STEP, "0")) is not None
