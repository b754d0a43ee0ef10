"""Chunks as changes of other chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.services.trainer.changes import shard_change
from miles.weights.transports.grpc_chunks.changes import apply_change, find_change


@settings(deadline=None)
@given(st.binary(max_size=600), st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), max_size=30))
def test_a_change_makes_the_new_chunk_of_the_old_one(old: bytes, writes: list[tuple[int, int]]) -> None:
    new = bytearray(old)
    for place, value in writes:
        if place < len(new):
            new[place] = value
    change = find_change(old, bytes(new))
    assert len(change) <= 0.25 * len(new)
    if change:
        assert apply_change(change, old) == new


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 299_999), max_size=10))
def test_the_bytes_are_those_of_a_changed_shard(places: set[int]) -> None:
    old = np.zeros(300_000, np.uint16)
    new = old.copy()
    new[sorted(places)] = 7
    change = find_change(old.tobytes(), new.tobytes())
    found = shard_change.find_change(*(torch.from_numpy(words.view(np.int16)) for words in (old, new)))
    assert change == found.data.numpy().tobytes()


def test_chunks_that_nothing_is_gained_by_comparing_give_no_change() -> None:
    old, new = bytes(1000), bytes(range(1, 251)) * 4
    assert find_change(old, new) == b"", "all of it has changed"
    assert find_change(old, old) == b""
    assert find_change(old, bytes(998)) == b""
    assert find_change(bytes(999), bytes(998) + b"x") == b""


@pytest.mark.parametrize("change", [b"abc", bytes(6), b"\xff\xff\x01\x00"])
def test_damaged_changes_are_refused(change: bytes) -> None:
    with pytest.raises(ValueError, match="a change"):
        apply_change(change, bytes(100))
