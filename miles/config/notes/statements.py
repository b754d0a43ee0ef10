"""Notes on settings that state what is so anyway."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.catalog import catalog
from miles.config.schema.flat_settings import FlatSettings


@noted
def true_statements(s: FlatSettings) -> Iterator[Note]:
    for key, entry in catalog().items():
        if entry.states is not None and s.given(key) and getattr(s, key) == entry.states.value:
            yield Note(key, entry.states.value, f"it changes nothing: {entry.states.because}")


@noted
def settings_of_no_consequence(s: FlatSettings) -> Iterator[Note]:
    for key, entry in catalog().items():
        if entry.ignored is not None and s.given(key):
            yield Note(key, getattr(s, key), f"it changes nothing: {entry.ignored.because}")


@noted
def components_that_are_restarted(s: FlatSettings) -> Iterator[Note]:
    if s.ft_components:
        text = "it changes nothing: every service is restarted"
        yield Note("ft_components", list(s.ft_components), text)
