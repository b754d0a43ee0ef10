"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.gateway.rate_limit import RateLimit


def test_a_burst_passes_then_the_rate_holds() -> None:
    limit = RateLimit(per_s=2, burst=3)
    assert [limit.take("a", 0.0) for _ in range(3)] == [0, 0, 0]
    assert limit.take("a", 0.0) == 0.5
    assert limit.take("a", 0.5) == 0
    assert limit.take("a", 0.6) > 0


def test_names_do_not_share() -> None:
    limit = RateLimit(per_s=1, burst=1)
    assert limit.take("a", 0.0) == 0
    assert limit.take("b", 0.0) == 0
    assert limit.take("a", 0.0) > 0


@given(st.lists(st.floats(0, 2), max_size=60))
def test_no_more_pass_than_burst_and_rate_allow(gaps: list[float]) -> None:
    limit, now, passed = RateLimit(per_s=3, burst=5), 0.0, 0
    for gap in gaps:
        now += gap
        passed += limit.take("a", now) == 0
        assert passed <= 5 + 3 * now + 1e-6


@given(st.floats(0, 10))
def test_waiting_as_long_as_told_is_enough(start: float) -> None:
    limit = RateLimit(per_s=7, burst=1)
    limit.take("a", start)
    wait_s = limit.take("a", start)
    assert limit.take("a", start + wait_s + 1e-9) == 0
