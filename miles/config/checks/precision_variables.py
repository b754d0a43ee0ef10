"""Checks whether variables in this environment choose another format than the settings do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.schema.precision_variables import contradicted


def variable_faults(s: FlatSettings, environment: Mapping[str, str] = os.environ) -> Iterator[Fault]:
    """Yield a fault for each variable that says otherwise."""
    for asked in contradicted(s, environment):
        name = asked.variable.partition(" ")[0]
        problem = f"{asked.variable} in the environment says otherwise"
        yield Fault(asked.key, getattr(s, asked.key), problem, f"unset {name}, or leave {asked.key} out")
