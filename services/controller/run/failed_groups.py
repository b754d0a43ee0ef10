"""What happens to a group that failed: it is retried a few times, then dropped. Pure."""

from __future__ import annotations

from collections import Counter

_MAX_FAILURES = 5
"""Failed attempts of one group before it is dropped."""
_TELLING = 4
"""So many failed attempts in a row are worth a word."""
MAX_DROPPED_IN_A_ROW = 32
"""Groups dropped for failures, with none accepted between, before the job fails: something is wrong for all of them."""


class FailedGroups:
    """Counts failed attempts of groups, and groups dropped for them."""

    def __init__(self) -> None:
        self._failures: Counter[int] = Counter()
        self.dropped_in_a_row = 0
        self._attempts_in_a_row = 0
        """Attempts that failed since a group finished."""
        self._error = ""
        """Of the last of them."""

    def describe(self) -> str:
        """Say what fails while nothing but failures comes back; empty otherwise."""
        if self._attempts_in_a_row < _TELLING:
            return ""
        return f"the last {self._attempts_in_a_row} attempts at groups failed, the last with: {self._error}"

    def may_retry(self, group_id: int, retryable: bool, error: str = "") -> bool:
        """Count a failed attempt; return whether the group gets another one."""
        self._attempts_in_a_row += 1
        self._error = error
        self._failures[group_id] += 1
        return retryable and self._failures[group_id] < _MAX_FAILURES

    def drop(self, group_id: int) -> bool:
        """Count a dropped group; return whether so many were dropped in a row that the job has to fail."""
        self._failures.pop(group_id, None)
        self.dropped_in_a_row += 1
        return self.dropped_in_a_row >= MAX_DROPPED_IN_A_ROW

    def finish(self, group_id: int) -> None:
        """Forget the failures of a group that finished."""
        self._failures.pop(group_id, None)
        self._attempts_in_a_row = 0

    def accept(self) -> None:
        """A group was accepted: not every group fails."""
        self.dropped_in_a_row = 0
