"""Derives settings of drafts from what engines draft with."""

from __future__ import annotations

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of

_RESPONSES = 4
"""Earlier responses to a prompt: more of them differ at the same place, and an engine looks through all."""


def derive_drafts(s: FlatSettings) -> list[Fault]:
    """Fill in what is not given."""
    speculation = speculation_of(s.sglang_args)
    if s.is_empty("draft_unroll_steps"):
        s.fill("draft_unroll_steps", speculation.num_steps or 1)
    if s.is_empty("draft_responses_per_prompt"):
        s.fill("draft_responses_per_prompt", _RESPONSES if speculation.kind is DraftKind.NGRAM else 0)
    return []
