"""Joining what several requests gave of one response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.types import SpeculativeStats, VersionSpan

Experts = npt.NDArray[np.integer[Any]]


def join_spans(
    before: Sequence[VersionSpan], added: Sequence[VersionSpan], response_length: int
) -> tuple[VersionSpan, ...]:
    """Append `added`, counted from 0, to `before`, which covers `response_length` tokens; merge equal neighbours."""
    spans = list(before)
    for span in added:
        shifted = VersionSpan(span.version, span.start + response_length, span.end + response_length)
        if shifted.start == shifted.end:
            continue
        if spans and spans[-1].version == shifted.version and spans[-1].end == shifted.start:
            spans[-1] = VersionSpan(shifted.version, spans[-1].start, shifted.end)
        else:
            spans.append(shifted)
    return tuple(spans)


def join_experts(before: Experts | None, added: Experts | None) -> Experts | None:
    """Concatenate the rows of `before` and `added`, both of shape (positions, moe_layers, top_k).

    Raises ValueError when they are not of the same model.
    """
    if before is None or added is None or not len(before):
        return added
    if before.shape[1:] != added.shape[1:] or before.dtype != added.dtype:
        raise ValueError(
            f"routed experts so far have shape {before.shape} of {before.dtype}, but those of the resumed response "
            f"{added.shape} of {added.dtype}"
        )
    return np.concatenate([before, added])


def add_speculative(before: SpeculativeStats | None, added: SpeculativeStats | None) -> SpeculativeStats | None:
    """Sum the statistics of two pieces; None when neither was decoded speculatively."""
    if before is None or added is None:
        return added or before
    return SpeculativeStats(
        accepted_draft_tokens=before.accepted_draft_tokens + added.accepted_draft_tokens,
        proposed_draft_tokens=before.proposed_draft_tokens + added.proposed_draft_tokens,
        verify_count=before.verify_count + added.verify_count,
    )
