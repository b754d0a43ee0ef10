"""The staleness bound when it is left out."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig


@pytest.mark.parametrize(
    ("given", "staleness"),
    [
        ({}, 0),
        ({"max_weight_staleness": 2}, 2),
        ({"over_sampling_batch_size": 8}, 0),
        ({"over_sampling_batch_size": 9}, 1),
        ({"over_sampling_batch_size": 17}, 2),
        ({"over_sampling_batch_size": 9, "max_weight_staleness": 3}, 3),
        ({"update_weights_interval": 3}, 2),
        ({"partial_rollout": True}, 1),
    ],
)
def test_the_bound_is_the_smallest_that_the_rest_needs(given: dict[str, Any], staleness: int) -> None:
    assert JobConfig.from_flat(MINIMAL | given).rollout.max_weight_staleness == staleness
