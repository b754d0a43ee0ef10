"""Notes on settings of trackers."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.catalog import catalog
from miles.config.schema.flat_settings import FlatSettings


@noted
def names_for_a_tracker_that_is_off(s: FlatSettings) -> Iterator[Note]:
    if s.use_wandb:
        return
    for key, entry in catalog().items():
        if key.startswith("wandb_") and s.given(key) and getattr(s, key) != entry.default:
            yield Note(
                key, "[redacted]" if key == "wandb_key" else getattr(s, key), "it does nothing without use_wandb"
            )
