"""Notices groups that are preempted again and again without getting on. Pure."""

from __future__ import annotations

import dataclasses

_TOLD_AT = 8
"""So many preemptions in a row without a new token are no coincidence any more."""


@dataclasses.dataclass(slots=True)
class _Preempted:
    saved_tokens: int = -1
    times: int = 0


class PreemptedGroups:
    """Counts each group's preemptions since it last got on."""

    def __init__(self) -> None:
        self._groups: dict[int, _Preempted] = {}

    def preempt(self, group_id: int, saved_tokens: int) -> str:
        """Count a preemption with which so many tokens of the group are stored; return what to say, if anything."""
        known = self._groups.setdefault(group_id, _Preempted())
        if saved_tokens > known.saved_tokens >= 0:
            known.times = 0
        known.saved_tokens = saved_tokens
        known.times += 1
        if known.times % _TOLD_AT:
            return ""
        return (
            f"group {group_id} was preempted {known.times} times in a row without a new token ({saved_tokens} are "
            "stored): its engine aborts its requests, or weights change faster than it can begin"
        )

    def finish(self, group_id: int) -> None:
        """Forget a group that finished or failed."""
        self._groups.pop(group_id, None)
