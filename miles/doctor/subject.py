"""What is examined: this machine, and the configuration that was given, if any."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from miles.config.command.flags import CommandLine
from miles.config.job import examine, resolved
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """The machine, and a configuration resolved for it."""

    settings: FlatSettings | None
    """None when no configuration was given. Reading a setting that is at fault raises InvalidSetting."""
    faults: Sequence[Fault] = ()
    """Faults of the configuration's values and their combination."""

    @classmethod
    def of(cls, line: CommandLine) -> Subject:
        """Return the subject of a command line; one without any setting is about the machine alone."""
        if not line.flat and not line.faults:
            return cls(None)
        examination = examine(resolved(line.flat))
        return cls(examination.settings, line.merge(examination.faults))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or `default` without a configuration. Raises InvalidSetting."""
        return default if self.settings is None else getattr(self.settings, key)

    @property
    def run_dir(self) -> pathlib.Path:
        """The folder of the run; without a configuration, where runs go by default."""
        return pathlib.Path(self.get("run_dir", "runs"))
