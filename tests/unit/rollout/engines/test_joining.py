from __future__ import annotations

import numpy as np
import pytest

from miles.services.rollout.engines.joining import join_experts, join_spans
from miles.types import VersionSpan


def test_spans_shift_and_equal_neighbours_join() -> None:
    before = (VersionSpan(1, 0, 2), VersionSpan(2, 2, 5))
    assert join_spans(before, (VersionSpan(2, 0, 3), VersionSpan(4, 3, 4)), 5) == (
        VersionSpan(1, 0, 2),
        VersionSpan(2, 2, 8),
        VersionSpan(4, 8, 9),
    )
    assert join_spans((), (VersionSpan(0, 0, 0), VersionSpan(1, 0, 1)), 0) == (VersionSpan(1, 0, 1),)


def test_new_experts_follow_those_that_were_sampled_from() -> None:
    before, added = np.zeros((3, 1, 1), np.uint8), np.ones((2, 1, 1), np.uint8)
    joined = join_experts(before, added)
    assert joined is not None
    assert joined.ravel().tolist() == [0, 0, 0, 1, 1]
    assert join_experts(None, added) is added


def test_experts_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="routed experts"):
        join_experts(np.zeros((3, 2, 1), np.uint8), np.ones((5, 1, 1), np.uint8))
    with pytest.raises(ValueError, match="routed experts"):
        join_experts(np.zeros((3, 1, 1), np.uint16), np.ones((5, 1, 1), np.uint8))
