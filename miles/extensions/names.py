"""Names of built-in functions, as recipes give them. The one place where a name of another system is mapped."""

from __future__ import annotations

_SYSTEMS = ("miles", "slime")


def names_of(path: str) -> tuple[str, ...]:
    """Return a path with each system's name in front."""
    return tuple(f"{system}.{path}" for system in _SYSTEMS)


_FILTERS = "rollout.filter_hub.dynamic_sampling_filters."
DYNAMIC_FILTERS = (*names_of(_FILTERS + "check_reward_nonzero_std"), *names_of(_FILTERS + "check_no_aborted"))
"""Of dynamic_sampling_filter_path; `miles.rollout.filter_hub` has the functions."""
