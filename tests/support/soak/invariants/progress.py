"""A job goes on, or says why it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

EXPLAIN_S = 60.0
"""Time without progress (on an idle machine, as all here) after which the status must say what the job waits for."""
LINGER_S = 100.0
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


IDLE_START_S = 15.0
"""How long services take to start on an idle machine of two slow cores."""
MOST_PACE = 6.0


def pace_of(start_s: float) -> float:
    """How many times longer things take on this machine than on an idle one, given how long a start took."""
    return min(MOST_PACE, max(1.0, start_s / IDLE_START_S))


def explanation(status: Mapping[str, Any]) -> str:
    """What a job's status says it waits for: the text, and the list of waits where there is one."""
    waits = status.get("waits") or []
    said = [status.get("waiting_for"), *(part for wait in waits for part in (wait.get("what"), wait.get("detail")))]
    return "; ".join(str(part) for part in said if part)
