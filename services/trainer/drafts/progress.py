"""Where the training of a draft model stands, as it is told to others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from miles.rpc.gen import draft_trainer_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class DraftProgress:
    """Replaced as a whole at each change, so that any thread may read it."""

    activity: str = "loading"
    version: int | None = None
    """Newest version that is PREPARED; None before the first."""
    recordings: int = 0
    """Recordings trained on since the first start, a count."""
    missed_recordings: int = 0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of the newest version."""
    recorded_step: int | None = None
    optimizer_steps: int = 0
    """Since this process began, a count."""

    def to_proto(self) -> draft_trainer_pb2.WatchDraftsResponse:
        """As the wire shows it, without warnings."""
        return draft_trainer_pb2.WatchDraftsResponse(
            activity=self.activity,
            version=self.version,
            recordings=self.recordings,
            missed_recordings=self.missed_recordings,
            metrics=self.metrics,
            recorded_step=self.recorded_step,
        )
