"""Says when engines turn drafts off because they do not pay, and on again. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from miles.rpc.gen import rollout_pb2

_MOST_STEPS = 64
_SHOWN = 4


class DraftSwitches:
    """Tells of an engine's switches at growing distances, so that one that goes back and forth does not fill a log."""

    def __init__(self) -> None:
        self._on: dict[str, bool] = {}
        """As people were told last; what an engine begins with is not told unless it has turned drafts off."""
        self._quiet_until: dict[str, int] = {}
        self._distance: dict[str, int] = {}

    def note(self, step: int, engines: Iterable[tuple[str, rollout_pb2.SpeculationProgress]]) -> list[str]:
        """Take in how engines draft at the end of a step; return what people are to be told."""
        switched: dict[tuple[bool, str], list[str]] = defaultdict(list)
        for engine, progress in engines:
            on = progress.num_steps > 0
            if not on and not progress.reason:
                continue  # it has not begun
            if self._on.get(engine, True) == on or step < self._quiet_until.get(engine, step):
                self._on.setdefault(engine, on)
                continue
            self._on[engine] = on
            distance = self._distance[engine] = min(2 * self._distance.get(engine, 1), _MOST_STEPS)
            self._quiet_until[engine] = step + distance
            switched[on, progress.reason].append(f"{engine} (up to {progress.num_steps})" if on else engine)
        return [_text(step, on, reason, names) for (on, reason), names in switched.items()]


def _text(step: int, on: bool, reason: str, engines: list[str]) -> str:
    more = f" and {len(engines) - _SHOWN} engines more" if len(engines) > _SHOWN else ""
    what = "draft again" if on else "draft no more, which is tried again later"
    because = f": {reason}" if reason else ""
    return f"step {step}: these engines {what}: {', '.join(engines[:_SHOWN])}{more}{because}"
