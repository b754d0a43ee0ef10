"""When a process that has ended is restarted: a pure rule."""

from __future__ import annotations

import dataclasses

from miles.rpc.exit_codes import ExitCode

_PERMANENT = frozenset(
    {
        ExitCode.BAD_CONFIG,
        ExitCode.PORT_IN_USE,
        ExitCode.REDIS_UNSUITABLE,
        ExitCode.REDIS_REFUSED,
        ExitCode.TLS_FAILED,
        ExitCode.NOT_A_CONTROLLER,
        ExitCode.REDIS_IN_USE,
        ExitCode.MODEL_UNUSABLE,
        ExitCode.DATA_UNUSABLE,
    }
)
"""Exit codes of causes that a restart cannot remove."""


@dataclasses.dataclass(slots=True)
class RestartPolicy:
    """Restarts with growing delays, and no more after `limit` ends within `window_s`."""

    limit: int = 5
    window_s: float = 300.0
    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    _ends_s: list[float] = dataclasses.field(default_factory=list)

    def delay_after(self, exit_code: int, now_s: float) -> float | None:
        """Return the seconds until the next start, or None for no restart. `exit_code` is negative for a signal."""
        if exit_code in _PERMANENT:
            return None
        self._ends_s = [end for end in self._ends_s if end > now_s - self.window_s] + [now_s]
        if len(self._ends_s) > self.limit:
            return None
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** (len(self._ends_s) - 1)))
