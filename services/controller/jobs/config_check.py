"""Checks a configuration for services that run already, and lists everything that is wrong with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from typing import Any

from miles.config import ConfigError, JobConfig
from miles.config.checks.environment import file_faults
from miles.config.job import examine, resolved
from miles.config.schema.faults import Fault


def check_config(config_json: str, refused: Collection[str]) -> list[Fault]:
    """List faults of the values, of their combination, and of the files and functions they name.

    Settings that were `refused` already are not checked; faults that concern them are left out.
    """
    flat: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        flat = json.loads(config_json)
    if not isinstance(flat, dict):
        try:
            JobConfig.from_json(config_json)
        except ConfigError as error:
            return list(error.faults)
    flat = resolved(flat)
    examination = examine(flat, refused)
    faults = [*examination.faults, *file_faults(examination.settings)]
    return [fault for fault in faults if fault.field not in refused]
