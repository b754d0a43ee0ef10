"""The progress of a training step, for its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a training step has got; `phase` is a name of `TrainPhase` in trainer.proto, lower-case, no prefix."""

    phase: str
    micro_batches_done: int
    micro_batches: int


Report = Callable[[Progress], None]
"""Called whenever there is progress."""
