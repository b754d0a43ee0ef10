"""A job goes on, or says why it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EXPLAIN_S = 90.0
"""Time without progress after which the status must say what the job waits for."""
LINGER_S = 150.0
"""Time without progress after which a job that cannot work is cancelled; by then it must have said why."""
HANG_S = 420.0
"""Time without progress after which a job that can work is taken for hanging."""


@dataclasses.dataclass(slots=True)
class Still:
    """Since when a job stands still."""

    mark: tuple[Any, ...]
    since_s: float


class Progress:
    """Follows all jobs. Time in which services are killed or frozen does not count."""

    def __init__(self) -> None:
        self._still: dict[int, Still] = {}

    def observe(self, number: int, now_s: float, mark: tuple[Any, ...], *, calm: bool) -> float:
        """Return for how long the job's mark (state, steps, phase) has been the same while all services were well."""
        still = self._still.get(number)
        if still is None or still.mark != mark or not calm:
            self._still[number] = Still(mark, now_s)
            return 0.0
        return now_s - still.since_s

    def forget(self, number: int) -> None:
        """The job has ended."""
        self._still.pop(number, None)


def explanation(status: Mapping[str, Any]) -> str:
    """What a job's status says it waits for: the text, and the list of waits where there is one."""
    waits = status.get("waits") or []
    return "; ".join(filter(None, [str(status.get("waiting_for") or ""), *map(str, waits)]))
