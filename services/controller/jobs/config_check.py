"""Everything that is wrong with a configuration for services that run already."""

from __future__ import annotations

import json
from collections.abc import Collection

from miles.config import ConfigError, JobConfig
from miles.config.checks.environment import file_faults
from miles.config.job import examine, resolved
from miles.config.schema.faults import Fault


def check_config(config_json: str, refused: Collection[str]) -> list[Fault]:
    """Faults of the values, of their combination, and of the files and functions they name.

    Settings that were `refused` already are not looked at; faults that concern them are left out.
    """
    try:
        flat = json.loads(config_json)
    except ValueError:
        flat = None
    if not isinstance(flat, dict):
        try:
            JobConfig.from_json(config_json)
        except ConfigError as error:
            return list(error.faults)
    flat = resolved(flat)
    examination = examine(flat, refused)
    faults = [*examination.faults, *file_faults(examination.settings)]
    return [fault for fault in faults if fault.field not in refused]
