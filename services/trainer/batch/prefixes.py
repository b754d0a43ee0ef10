"""How many tokens a sample has in common, from its beginning, with others of its group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from miles.types import Sample


def longest_prefix(sample: Sample, others: Sequence[Sample]) -> tuple[int, int]:
    """Which of the others begins like the sample for the longest, and for how many rows; (0, 0) when none does.

    A row is every token but the last, which predicts nothing. Rows are alike when all tokens up to them are, and the
    experts that the engine chose for them, where it recorded them.
    """
    found, longest = 0, 0
    rows = len(sample.tokens) - 1
    for number, other in enumerate(others):
        if longest == rows:
            break
        end = min(rows, len(other.tokens) - 1)
        if end <= longest or not _is_longer(sample, other, longest):
            continue
        common = _equal_entries(sample.tokens[:end], other.tokens[:end])
        if common > longest:
            common = _equally_routed(sample, other, common)
        if common > longest:
            found, longest = number, common
    return found, longest


def _is_longer(sample: Sample, other: Sample, rows: int) -> bool:
    """Whether the two may be alike for more rows: the next one is. Spares most comparisons of whole samples."""
    if sample.tokens[rows] != other.tokens[rows]:
        return False
    routed, others = sample.rollout_routed_experts, other.rollout_routed_experts
    return routed is None or others is None or bool((routed[rows] == others[rows]).all())


def _equally_routed(sample: Sample, other: Sample, end: int) -> int:
    """How many of the first `end` rows the engine sent to the same experts; all of them where it recorded none."""
    routed, others = sample.rollout_routed_experts, other.rollout_routed_experts
    if routed is None and others is None:
        return end
    if routed is None or others is None:
        return 0
    return _equal_entries(routed[:end], others[:end])


def _equal_entries(left: npt.NDArray[np.integer], right: npt.NDArray[np.integer]) -> int:
    """Length of the common beginning of two arrays of one shape."""
    unlike = left != right
    if unlike.ndim > 1:
        unlike = unlike.reshape(len(left), -1).any(axis=1)
    first = int(unlike.argmax()) if len(unlike) else 0
    return first if len(unlike) and unlike[first] else len(unlike)
