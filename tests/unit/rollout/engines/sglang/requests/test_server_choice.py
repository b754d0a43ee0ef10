from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.sglang.requests.concurrency import ConcurrencyLimit
from miles.services.rollout.engines.sglang.requests.server_choice import Candidate, Router


def servers(*running: int, limit: int = 8, version: int | None = 1) -> list[Candidate]:
    return [Candidate(i, count, limit, version) for i, count in enumerate(running)]


def test_a_group_stays_on_its_server_and_groups_go_where_load_is_least() -> None:
    router = Router()
    assert router.choose(servers(3, 1, 2), "a", 1) == 1
    assert router.choose(servers(0, 5, 0), "a", 1) == 1
    assert router.choose(servers(3, 5, 2), "b", 1) == 2
    assert router.choose(servers(0, 5, 3), "b", 1) == 2


def test_a_group_waits_for_its_server_unless_another_has_much_room() -> None:
    router = Router()
    router.choose(servers(0, 8), "a", 1)
    assert router.choose(servers(8, 5), "a", 1) is None
    assert router.choose(servers(8, 3), "a", 1) == 1
    assert router.choose(servers(0, 4), "a", 1) == 1  # there it stays


def test_only_servers_with_the_version_and_room_get_requests() -> None:
    router = Router()
    assert router.choose(servers(0, 0, version=None), "", 1) is None
    assert router.choose(servers(0, version=2), "", 1) is None
    assert router.choose(servers(8), "", 1) is None
    mixed = [Candidate(0, 0, 8, 1), Candidate(1, 5, 8, 2)]
    assert router.choose(mixed, "", 2) == 1
    router.choose([Candidate(0, 0, 8, 2)], "a", 2)
    assert router.choose(mixed, "a", 2) == 1  # its server fell behind


def test_a_request_without_a_group_leaves_no_trace() -> None:
    router = Router()
    assert router.choose(servers(0, 1), "", 1) == 0
    assert router.choose(servers(2, 1), "", 1) == 1


@given(
    loads=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.sampled_from([None, 1, 2])), max_size=6),
    groups=st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=20),
)
def test_no_server_is_given_more_than_its_limit(loads: list[tuple[int, int, int | None]], groups: list[str]) -> None:
    router = Router()
    running = [count for count, _, _ in loads]
    for group in groups:
        candidates = [Candidate(i, running[i], limit, version) for i, (_, limit, version) in enumerate(loads)]
        chosen = router.choose(candidates, group, 1)
        if chosen is not None:
            assert candidates[chosen].version == 1
            assert candidates[chosen].running < candidates[chosen].limit
            running[chosen] += 1


def test_the_limit_falls_fast_when_the_cache_is_full_and_rises_slowly_when_it_is_used_up() -> None:
    limit = ConcurrencyLimit(ceiling=64)
    assert limit.limit == 64
    limit.observe(cache_use=0.97, running=64, waiting=0)
    assert limit.limit == 48
    limit.observe(cache_use=0.9, running=40, waiting=8)
    assert limit.limit == 36
    limit.observe(cache_use=0.9, running=36, waiting=0)  # full enough, and nothing waits
    assert limit.limit == 36
    limit.observe(cache_use=0.5, running=36, waiting=0)
    assert limit.limit == 44
    limit.observe(cache_use=0.5, running=3, waiting=0)  # not used up: no reason to rise
    assert limit.limit == 44


@given(loads=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 100), st.integers(0, 100), st.booleans()), max_size=50))
def test_the_limit_stays_between_one_and_the_ceiling(loads: list[tuple[float, int, int, bool]]) -> None:
    limit = ConcurrencyLimit(ceiling=32)
    for cache_use, running, waiting, retracted in loads:
        limit.observe(cache_use=cache_use, running=running, waiting=waiting, retracted=retracted)
        assert 1 <= limit.limit <= 32


def test_an_idle_server_recovers_its_limit_once_it_is_used() -> None:
    limit = ConcurrencyLimit(ceiling=64)
    for _ in range(20):
        limit.observe(cache_use=1.0, running=limit.limit, waiting=0)
    assert limit.limit == 1
    for _ in range(20):
        limit.observe(cache_use=0.2, running=limit.limit, waiting=0)
    assert limit.limit == 64
