"""How many steps of a job are safe, by its summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.checkpoint_folder import step_of

GENERATED_ONLY = "generated_only"
"""Key in a job's summary: how far a run without a trainer has got, which writes no checkpoints."""


def saved_step(summary: Mapping[str, Any]) -> int | None:
    """Return the steps that the newest checkpoint covers, or that a run without one has taken; None when none is."""
    generated: int | None = summary.get(GENERATED_ONLY, {}).get("step")
    return step_of(summary.get("checkpoint", "")) if generated is None else generated
