"""Which experts each token went to."""

from __future__ import annotations

import numpy as np
import pytest

from miles.services.rollout.engines.torch.model.routing_recorder import RoutingLog


def test_choices_recorded_first_stay_when_positions_are_computed_again() -> None:
    log = RoutingLog()
    first = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    log.extend(0, first)
    log.extend(0, np.full((5, 2, 2), 99, dtype=np.uint8))
    assert log.length == 5
    assert log.prefix(3).tolist() == first.tolist()
    assert log.prefix(5)[3:].tolist() == np.full((2, 2, 2), 99).tolist()


def test_a_gap_is_refused() -> None:
    log = RoutingLog()
    with pytest.raises(ValueError, match="positions 0 to 3 is missing"):
        log.extend(4, np.zeros((1, 2, 2), dtype=np.uint8))
