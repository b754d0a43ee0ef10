"""Functions of users besides rewards and filters of groups."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import DottedPath, Metavar, PositiveFloat, Section


class ExtensionsConfig(Section):
    """Functions of users, called in the places that docs/extensions.md lists."""

    custom_generate_function_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Async function (args, sample, sampling_params) that generates the trajectory of a sample with any number of
    requests to the engine."""

    custom_generate_timeout_s: PositiveFloat = 3600.0
    """Timeout of a call of custom_generate_function_path, in seconds; the group is then generated again."""
