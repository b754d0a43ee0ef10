"""Rules about settings that state what is so anyway."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings


@rule
def statements_are_true(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        if entry.states is None or not s.given(key):
            continue
        value = getattr(s, key)
        if value != entry.states.value:
            yield Fault(key, value, entry.states.because, "leave it out")
