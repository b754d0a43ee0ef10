"""Derives settings of drafts from what engines draft with."""

from __future__ import annotations

import pathlib

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of
from miles.drafts.folders import initial_dir

_RESPONSES = 4
"""Earlier responses to a prompt: more of them differ at the same place, and an engine looks through all."""


def derive_drafts(s: FlatSettings) -> list[Fault]:
    """Fill in what is not given."""
    speculation = speculation_of(s.sglang_args)
    if s.is_empty("draft_unroll_steps"):
        s.fill("draft_unroll_steps", speculation.num_steps or 1)
    from_nothing = speculation.kind is DraftKind.EAGLE3 and speculation.draft_model_path is None
    if s.enable_draft_training and from_nothing:
        folder = str(initial_dir(pathlib.Path(s.run_dir)))
        s.fill("sglang_args", {**s.sglang_args, "speculative_draft_model_path": folder})
    if s.is_empty("draft_responses_per_prompt"):
        s.fill("draft_responses_per_prompt", _RESPONSES if speculation.kind is DraftKind.NGRAM else 0)
    return []
