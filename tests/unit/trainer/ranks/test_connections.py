"""Ranks notice that another one is gone, and why."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from miles.addresses import LOOPBACK, split_address
from miles.services.trainer.ranks.connections import RankConnections, RanksMissingError, connect_ranks
from miles.threads import Threads

SILENCE_S, DEADLINE_S = 60.0, 120.0


@pytest.fixture
def lost() -> queue.Queue[str]:
    """What ranks have reported as lost."""
    return queue.Queue()


@pytest.fixture
def ranks(lost: queue.Queue[str]) -> Iterator[list[RankConnections]]:
    """Three ranks of one process, connected."""
    store = HashStore()
    with Threads(3) as threads:
        joining = [threads.submit(join, store, rank, 3, lost.put) for rank in range(3)]
        connected = [each.result(DEADLINE_S) for each in joining]
        yield connected
        for each in connected:
            each.close(orderly=False)


def join(
    store: HashStore, rank: int, count: int, on_lost: Callable[[str], None], deadline_s: float = DEADLINE_S
) -> RankConnections:
    return connect_ranks(store, rank, count, LOOPBACK, silence_s=SILENCE_S, deadline_s=deadline_s, on_lost=on_lost)


def test_the_end_of_a_rank_is_known_to_rank_0_and_that_of_rank_0_to_all(
    ranks: list[RankConnections], lost: queue.Queue[str]
) -> None:
    ranks[2].close(orderly=False)
    assert lost.get(timeout=DEADLINE_S) == f"rank 2 on {socket.gethostname()} has ended"
    ranks[0].close(orderly=False)
    assert lost.get(timeout=DEADLINE_S) == f"rank 0 on {socket.gethostname()} has ended"
    assert not ranks[1].ended.is_set()


def test_an_orderly_end_is_told_and_no_rank_counts_as_lost(
    ranks: list[RankConnections], lost: queue.Queue[str]
) -> None:
    ranks[0].close(orderly=True)
    for other in ranks[1:]:
        assert other.ended.wait(DEADLINE_S)
        other.close(orderly=False)
    assert lost.empty()


def test_ranks_that_end_after_this_one_was_told_to_are_not_lost(
    ranks: list[RankConnections], lost: queue.Queue[str]
) -> None:
    ranks[0].expect_end()
    ranks[1].close(orderly=False)
    ranks[0].fail("a collective broke")
    ranks[0].close(orderly=True)
    assert ranks[2].ended.wait(DEADLINE_S)
    assert lost.empty()


def test_what_a_collective_noticed_is_reported_when_no_connection_tells(
    ranks: list[RankConnections], lost: queue.Queue[str]
) -> None:
    ranks[0].fail("a collective broke")
    assert lost.get(timeout=DEADLINE_S) == "a collective broke"


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RanksMissingError, match=r"waited 0.2 s for ranks 1, 2 to connect to rank 0"):
        join(HashStore(), 0, 3, print, deadline_s=0.2)


def test_only_ranks_are_let_in(lost: queue.Queue[str]) -> None:
    store = HashStore()
    with Threads(2) as threads:
        first = threads.submit(join, store, 0, 2, lost.put)
        said = json.loads(store.get("miles/ranks"))
        for hello in ({"token": "guessed", "rank": 1, "host": "far"}, ["no", "object"]):
            with contextlib.closing(socket.create_connection(split_address(said["address"]))) as stranger:
                stranger.sendall(json.dumps(hello).encode() + b"\n")
                assert stranger.recv(1) == b""
        assert not first.done()
        second = threads.submit(join, store, 1, 2, lost.put)
        connected = first.result(DEADLINE_S), second.result(DEADLINE_S)
    connected[0].close(orderly=True)
    connected[1].close(orderly=False)
    assert lost.empty()


def test_a_rank_that_ends_before_all_are_there_ends_the_others() -> None:
    store = HashStore()
    with Threads(1) as threads:
        first = threads.submit(join, store, 0, 3, print)
        said = json.loads(store.get("miles/ranks"))
        with contextlib.closing(socket.create_connection(split_address(said["address"]))) as other:
            other.sendall(json.dumps({"token": said["token"], "rank": 2, "host": "far"}).encode() + b"\n")
            time.sleep(0.1)
        with pytest.raises(RanksMissingError, match="rank 2 on far has ended before all ranks were there"):
            first.result(DEADLINE_S)
