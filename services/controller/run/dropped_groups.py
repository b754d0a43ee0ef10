"""Counts groups that are dropped after they were scored, and decides when that has gone on for too long. Pure."""

from __future__ import annotations

from collections import Counter

from miles.rpc.gen import rollout_pb2
from miles.services.controller.run.examples import describe_example

_FEWEST_TOLD = 8
"""So many groups dropped in a row are told first, or a batch if that is more."""
_MOST_REASONS = 8
"""Further reasons are counted as one."""
_SHOWN_REASONS = 3


class DroppedGroups:
    """Knows how many groups were dropped, in all and in a row, and for which reasons."""

    def __init__(self, batch_size: int, filter_path: str | None, max_batches: int) -> None:
        """`max_batches` batches' worth of dropped groups in a row are too many; 0 means never."""
        self._filter = filter_path
        self._limit = batch_size * max_batches
        self._told_at = max(_FEWEST_TOLD, batch_size)
        self._first_told = self._told_at
        self._finished = 0
        self._dropped = 0
        self._in_a_row = 0
        self._reasons: Counter[str] = Counter()
        """Of those in a row."""
        self._example = ""

    @property
    def telling(self) -> bool:
        """Whether so many were dropped in a row that people should know."""
        return self._in_a_row >= self._first_told

    @property
    def too_many(self) -> bool:
        """Whether so many were dropped in a row that the job has to fail."""
        return bool(self._limit) and self._in_a_row >= self._limit

    @property
    def limit(self) -> int:
        """Groups dropped in a row with which the job fails; 0 means that it never does."""
        return self._limit

    def keep(self) -> None:
        """Count a group that was kept."""
        self._finished += 1
        self._in_a_row = 0
        self._reasons.clear()
        self._told_at = self._first_told

    def drop(self, reason: str, example: rollout_pb2.ScoredExample | None) -> bool:
        """Count a dropped group; return whether people are to be told of those in a row: at growing counts."""
        self._finished += 1
        self._dropped += 1
        self._in_a_row += 1
        known = reason in self._reasons or len(self._reasons) < _MOST_REASONS
        self._reasons[reason if known else "other reasons"] += 1
        if example is not None:
            self._example = describe_example(example)
        if self._in_a_row < self._told_at:
            return False
        self._told_at *= 2
        return True

    def describe(self) -> str:
        """Say how many groups were dropped, by what and why."""
        shown = ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(_SHOWN_REASONS))
        by = f" by {self._filter}" if self._filter else ""
        example = f"; e.g. {self._example}" if self._example else ""
        return (
            f"the last {self._in_a_row} groups were all dropped{by} ({self._dropped} of {self._finished} in all): "
            f"{shown}{example}"
        )

    def failure(self) -> str:
        """Say why the job fails, and what to do about it."""
        remedy = "take prompts and a reward for which the responses of one prompt get different rewards"
        if self._filter:
            remedy += ", leave dynamic_sampling_filter_path out"
        return (
            f"{self.describe()}. Nothing would be trained on: {remedy}, or raise dynamic_sampling_max_dropped_batches "
            "(0: no limit)"
        )
