"""What a reward function may return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Number = float | int
Value = Number | Mapping[str, Number]
"""A reward: one finite number, or several named ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """A reward together with JSON values to merge into the sample's metadata."""

    reward: Value
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
