"""The newest events of a job: whole, in pieces, bounded."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.gateway.event_ring import PIECE_BYTES, EventRing, Message, parse_id, pieces


def message(number: int, size: int = 10) -> Message:
    return Message((number, 0), f"{number}-0", bytes([number % 251]) * size)


def filled(numbers: range, *, count: int = 1000, size_bytes: int = 1 << 30, size: int = 10) -> EventRing:
    ring = EventRing(count, size_bytes)
    for number in numbers:
        ring.append(message(number, size))
    return ring


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 40_000), st.integers(1, 300))
def test_a_reader_gets_every_event_that_is_held_once(events: int, start: int, size: int, count: int) -> None:
    ring = filled(range(1, events + 1), count=count, size=size)
    oldest = max(1, events - count + 1)
    cursor = (max(start, oldest), 0)
    assert ring.reaches(cursor)
    read = b""
    while (piece := ring.after(cursor)) is not None:
        assert len(piece.data) <= max(PIECE_BYTES, size)
        assert ring.after(cursor) is piece  # made once for all at the same place
        read += piece.data
        cursor = piece.id
    assert read == b"".join(message(number, size).data for number in range(max(start, oldest) + 1, events + 1))


def test_what_was_dropped_is_not_reached() -> None:
    ring = filled(range(1, 11), count=4)
    assert [ring.reaches((number, 0)) for number in (0, 6, 7, 10)] == [False, False, True, True]
    assert not EventRing(4, 100).reaches((0, 0))
    assert EventRing(4, 100).newest_id == ""
    assert ring.newest_id == "10-0"


def test_a_ring_is_bounded_in_bytes_but_holds_the_newest_event() -> None:
    ring = filled(range(1, 101), size_bytes=1000, size=100)
    assert ring.reaches((91, 0))
    assert not ring.reaches((90, 0))
    ring.append(message(101, 5000))
    assert ring.reaches((101, 0))
    assert not ring.reaches((100, 0))


def test_a_ring_that_begins_with_the_first_event_reaches_everything_until_that_is_dropped() -> None:
    ring = filled(range(5, 8), count=3)
    ring.begins_with(message(4))
    assert not ring.reaches((0, 0))
    ring.begins_with(message(5))
    assert ring.reaches((0, 0))
    first = ring.after((0, 0))
    assert first is not None
    assert first.event_id == "7-0"
    ring.append(message(8))
    assert not ring.reaches((0, 0))


def test_an_event_that_comes_is_in_the_next_piece() -> None:
    ring = filled(range(1, 3))
    assert ring.after((2, 0)) is None
    ring.append(message(3))
    piece = ring.after((2, 0))
    assert piece is not None
    assert (piece.data, piece.event_id) == (message(3).data, "3-0")
    ring.append(message(4))
    longer = ring.after((2, 0))
    assert longer is not None
    assert longer.event_id == "4-0"


def test_a_page_is_cut_into_pieces() -> None:
    cut = list(pieces([message(number, 40) for number in range(10)], limit_bytes=100))
    assert [piece.event_id for piece in cut] == ["1-0", "3-0", "5-0", "7-0", "9-0"]
    assert [len(piece.data) for piece in pieces([message(1, 500)], limit_bytes=100)] == [500]


@pytest.mark.parametrize("text", ["", "1", "a-b", "1-"])
def test_an_id_is_two_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_id(text)
