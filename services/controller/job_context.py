"""What every part of a run needs to know of its job."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True, slots=True)
class JobContext:
    """One job, resolved."""

    job_id: str
    config: JobConfig
    redis_url: str
    run_dir: pathlib.Path
    """Where the run's metrics, summary and checkpoints go."""
