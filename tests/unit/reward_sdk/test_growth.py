"""When a pool starts worker processes."""

from __future__ import annotations

import pytest

from miles.reward_sdk.growth import LOAD_S, workers_to_start


@pytest.mark.parametrize(
    ("workers", "waiting", "waited_s", "capacity", "expected"),
    [
        pytest.param(0, 1, 0.0, 1, 1, id="the first worker starts at once"),
        pytest.param(0, 9, 0.0, 1, 1, id="and alone, as it may score all that waits within milliseconds"),
        pytest.param(1, 99, LOAD_S / 2, 1, 0, id="a short wait shows no load"),
        pytest.param(1, 99, LOAD_S, 1, 1, id="with load the number doubles"),
        pytest.param(4, 99, LOAD_S, 1, 4, id="with load the number doubles again"),
        pytest.param(12, 99, LOAD_S, 1, 4, id="up to the size"),
        pytest.param(16, 99, 9.0, 1, 0, id="never beyond the size"),
        pytest.param(4, 2, LOAD_S, 1, 2, id="no more than the calls that wait need"),
        pytest.param(4, 300, LOAD_S, 256, 2, id="of which one worker may run many"),
    ],
)
def test_workers_start_as_load_shows_that_they_are_needed(
    workers: int, waiting: int, waited_s: float, capacity: int, expected: int
) -> None:
    count = workers_to_start(workers=workers, waiting=waiting, waited_s=waited_s, size=16, capacity=capacity)
    assert count == expected
