"""No service ends by itself: what the launcher says of ends, against the kills of the soak."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_END = re.compile(r"(\S+) ended with ([^;\n]*?)(?:; restarting it|\s+and is not restarted)")
_KILLED = "signal SIGKILL"


def end_faults(serve_log: str, kills: Mapping[str, int]) -> list[str]:
    """Faults of the launcher's log, given how often the soak killed each service."""
    ends = _END.findall(serve_log)
    faults = [f"{name} ended with {how}, by itself" for name, how in ends if how != _KILLED]
    killed = Counter(name for name, how in ends if how == _KILLED)
    return faults + [
        f"{name} was killed {count} times, {kills.get(name, 0)} of them by the soak"
        for name, count in killed.items()
        if count > kills.get(name, 0)
    ]
