"""How the time of a run is shared out, in words: `time_share` of its summary.json.

A share is that of the wall time from the first step to the last in which the controller waits for the activity:
`generate` while any group is leased to a rollout, waiting for an engine's slot included; `reward` while nothing but
rewards was waited for; `train` from the order for a step until its answer, reading its samples included; `sync` while
the trainer exports a version or engines activate one; `idle` while none of these is under way. In a synchronous run,
neither the rollout generates nor the trainer trains during `reward`, `sync` and `idle`.
"""

from __future__ import annotations

from collections.abc import Mapping


def shares_text(shares: Mapping[str, float]) -> str:
    """The shares, and what neither side works in."""
    named = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    working = shares.get("generate", 0.0) + shares.get("train", 0.0)
    return f"{named}; neither generating nor training {max(0.0, 1 - working):.1%}"
