from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from miles.queue.payload import Outstanding, decode_group, encode_group
from miles.types import SampleGroup


def test_a_group_survives_its_bytes(make_group: Callable[..., SampleGroup]) -> None:
    group = make_group(3, experts=(2, 2))
    assert decode_group(encode_group(group)) == group


@given(st.binary(max_size=200))
def test_arbitrary_bytes_decode_or_raise_value_error(data: bytes) -> None:
    try:
        group = decode_group(data)
    except ValueError:
        return
    assert decode_group(encode_group(group)) == group


def test_an_index_record_is_read_back() -> None:
    record = Outstanding.parse(b"7", b"1700-0 2 41 1234 -")
    assert record == Outstanding(group_id=7, entry_id="1700-0", attempt=2, oldest_version=41, nbytes=1234)
