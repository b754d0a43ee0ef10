"""Host memory through staging buffers into one buffer, which is a CPU's in place of a GPU's."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.weights.staging.ring import Bytes, StagingRing
from miles.weights.staging.to_device import copy_to_device

SLOT_BYTES = 64


@pytest.fixture(scope="module")
def threads() -> Iterator[concurrent.futures.Executor]:
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        yield executor


def new_ring(slots: int) -> StagingRing:
    return StagingRing(pin_memory=False, slot_bytes=SLOT_BYTES, slots=slots)


def parts_of(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[list[tuple[int, Bytes]], int]:
    """Random parts with gaps before them, and where they end."""
    random, parts, end = np.random.default_rng(seed), [], 0
    for gap, size in sizes:
        parts.append((end + gap, random.integers(0, 256, size, np.uint8)))
        end += gap + size
    return parts, end


def same(flat: torch.Tensor, parts: list[tuple[int, Bytes]]) -> bool:
    return all(np.array_equal(flat[start : start + part.size].numpy(), part) for start, part in parts)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), max_size=12), st.integers(1, 5))
def test_every_part_gets_to_its_place(
    threads: concurrent.futures.Executor, sizes: list[tuple[int, int]], slots: int
) -> None:
    ring = new_ring(slots)
    for version in range(2):
        parts, end = parts_of(sizes, version)
        flat = torch.zeros(end + 3, dtype=torch.uint8)
        copy_to_device(flat, parts, ring, threads)
        assert same(flat, parts)
        assert not flat[end:].any(), "nothing is written beyond the last part"


def test_many_copies_at_once_share_a_ring_that_is_smaller_than_what_they_would_hold() -> None:
    ring = new_ring(4)
    parts, end = parts_of([(0, 50)] * 60)
    flats = [torch.zeros(end, dtype=torch.uint8) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads, concurrent.futures.ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda flat: copy_to_device(flat, parts, ring, threads), flats))
    assert all(same(flat, parts) for flat in flats)


def test_a_copy_that_fails_gives_every_slot_back(threads: concurrent.futures.Executor) -> None:
    ring = new_ring(2)
    parts, end = parts_of([(0, 500)])
    with pytest.raises(RuntimeError, match="size"):
        copy_to_device(torch.zeros((end, 2), dtype=torch.uint8), parts, ring, threads)
    flat = torch.zeros(end, dtype=torch.uint8)
    copy_to_device(flat, parts, ring, threads)
    assert same(flat, parts)
