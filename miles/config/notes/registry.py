"""The registry of notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from miles.config.schema.faults import show
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """What becomes of a setting that was given."""

    field: str
    value: Any
    text: str

    def __str__(self) -> str:
        return f"{self.field} = {show(self.value)}: {self.text}"


Source = Callable[[FlatSettings], Iterator[Note]]
_SOURCES: list[Source] = []


def noted(function: Source) -> Source:
    """Register a generator of notes, which reads settings, and of files at most the model's config.json."""
    _SOURCES.append(function)
    return function


def notes(settings: FlatSettings) -> list[Note]:
    """Return all notes on these settings. A source ends at an invalid setting."""
    found: list[Note] = []
    for source in _SOURCES:
        try:
            for note in source(settings):
                found.append(note)  # one by one: what a source found before it ended counts
        except InvalidSetting:
            continue
    return found
