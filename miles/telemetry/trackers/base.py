"""The contract of a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes the metrics of a run's steps. Its methods may block for long, and raise whatever its package raises."""

    def write(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        """Take metrics of a step, measured at `unix_s`; a step may come in parts, and again after a resume."""

    def close(self) -> None:
        """Send what is left and end the run at the tracker; a later one with the same job continues it."""
