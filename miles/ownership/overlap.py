"""Which folders a configuration writes, and whether two jobs, or two settings of one, would write the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from miles.ownership.place import Place, locate, locate_pattern

OUTPUTS = ("run_dir", "save", "save_hf")
"""Settings that name folders which a run writes as its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One folder, or many when {rollout_id} is in the path."""

    key: str
    place: Place


def outputs_of(flat: Mapping[str, Any]) -> list[Output]:
    """Return the folders that a flat configuration writes. Raises ValueError for text that cannot be a path."""
    given = [(key, flat[key]) for key in OUTPUTS if flat.get(key) is not None]
    return [Output(key, locate_pattern(value) if key == "save_hf" else locate(value)) for key, value in given]


def shared(one: list[Output], other: list[Output]) -> tuple[Output, Output] | None:
    """Return the first output of each that are one folder or of which one lies in the other; None without any."""
    return next(((a, b) for a in one for b in other if a.place.meets(b.place)), None)
