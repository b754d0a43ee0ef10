"""Notes on what launch scripts say of the model's shape."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.checks.architecture.compare import undecided
from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings


@noted
def what_nothing_confirms(s: FlatSettings) -> Iterator[Note]:
    for key, value in undecided(s):
        yield Note(key, value, "it changes nothing, and the model's config.json does not say whether it is so")


@noted
def layers_follow_from_the_model(s: FlatSettings) -> Iterator[Note]:
    if s.spec is not None:
        yield Note("spec", list(s.spec), "layers are built as the model's config.json says, without the plugin")
