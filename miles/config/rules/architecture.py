"""Rules about the flags of the model's shape that settings alone decide."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_PLUGINS = ("slime_plugins.models.", "miles_plugins.models.")


@rule
def layers_are_those_of_the_model(s: FlatSettings) -> Iterator[Fault]:
    if s.spec is not None and not (len(s.spec) == 2 and s.spec[0].startswith(_PLUGINS)):
        problem = "layers are built as the model's config.json says, by no module of a user's"
        yield Fault("spec", list(s.spec), problem, "leave it out")
