"""What a filter of groups returns."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class DynamicFilterOutput:
    """The verdict on a group: keep it or drop it, and why it is dropped."""

    keep: bool
    reason: str | None = None
