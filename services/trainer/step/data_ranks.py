"""The replicas of the model that share a rollout's samples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True, slots=True)
class DataRanks:
    """This rank's replica among all replicas of the model."""

    rank: int
    count: int
    group: dist.ProcessGroup | None
    """One rank of each replica; None when there is one replica."""
