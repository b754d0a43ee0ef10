"""Derives settings of drafts from what engines draft with."""

from __future__ import annotations

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import speculation_of


def derive_drafts(s: FlatSettings) -> list[Fault]:
    """Fill in what is not given."""
    s.fill("draft_unroll_steps", speculation_of(s.sglang_args).num_steps or 1)
    return []
