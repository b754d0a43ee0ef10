"""The job of a run, as every part of the run needs it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Identity of the prompts and their order (`PromptSource.identity`); empty before they are read."""

    @functools.cached_property
    def config_json(self) -> str:
        """The configuration, as it is sent to every worker."""
        return json.dumps(self.config.to_flat())
