"""The job of a run, as every part of the run needs it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True)
class JobContext:
    """One job, resolved."""

    job_id: str
    config: JobConfig
    redis_url: str
    run_dir: pathlib.Path
    """Folder of the run's metrics, summary and checkpoints."""

    @functools.cached_property
    def config_json(self) -> str:
        """The configuration, as it is sent to every worker."""
        return json.dumps(self.config.to_flat())
