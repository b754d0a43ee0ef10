"""Changes of tensors as compressed pieces."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.weights.manifest import ManifestError
from miles.weights.transports.disk_delta.codec import PIECE_BYTES, Encoding, apply, encode, pieces

ENCODINGS = [Encoding.XOR, Encoding.OVERWRITE]


@settings(deadline=None)
@given(st.sampled_from(ENCODINGS), st.sampled_from([1, 2, 4, 8]), st.binary(max_size=400), st.data())
def test_a_change_turns_old_bytes_into_new_ones(
    encoding: Encoding, itemsize: int, seed: bytes, data: st.DataObject
) -> None:
    old = np.frombuffer(seed[: len(seed) // itemsize * itemsize], np.uint8).copy()
    new = old.copy()
    if old.size:
        for place in data.draw(st.lists(st.integers(0, old.size - 1), max_size=20)):
            new[place] ^= data.draw(st.integers(0, 255))
    frame = encode(encoding, old, new, itemsize)
    assert bool(frame) == bool((old != new).any()), "no change costs nothing"
    apply(encoding, frame, old, itemsize)
    assert (old == new).all()


def test_an_overwrite_may_be_applied_twice() -> None:
    old, new = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
    new[[3, 60]] = 7
    frame = encode(Encoding.OVERWRITE, old, new, 2)
    apply(Encoding.OVERWRITE, frame, old, 2)
    apply(Encoding.OVERWRITE, frame, old, 2)
    assert (old == new).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_percent_of_bfloat16_values_take_less_than_three_percent_of_the_bytes(encoding: Encoding) -> None:
    random = np.random.default_rng(0)
    old = (random.standard_normal(1 << 20, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    new = old.copy()
    new[random.random(old.size) < 0.02] += np.uint16(1)
    frame = encode(encoding, old.view(np.uint8), new.view(np.uint8), 2)
    assert len(frame) < 0.03 * old.nbytes


@settings(deadline=None)
@given(st.sampled_from(ENCODINGS), st.sampled_from([1, 2, 4]), st.binary(max_size=200), st.booleans())
def test_damaged_changes_are_refused_and_never_reach_beyond_the_piece(
    encoding: Encoding, itemsize: int, junk: bytes, compressed: bool
) -> None:
    frame = zstandard.ZstdCompressor().compress(junk) if compressed else junk
    memory = np.zeros(96, np.uint8)
    target = memory[32:64]
    with contextlib.suppress(ManifestError):
        apply(encoding, frame, target, itemsize)
    assert not memory[:32].any()
    assert not memory[64:].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_flipped_bit_in_a_frame_is_noticed(encoding: Encoding) -> None:
    old = np.zeros(4096, np.uint8)
    new = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8)
    frame = bytearray(encode(encoding, old, new, 2))
    frame[len(frame) // 2] ^= 1
    with pytest.raises(ManifestError, match="damaged"):
        apply(encoding, frame, old, 2)


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_takes_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    with pytest.raises(ManifestError, match="claims to hold 1048576 bytes"):
        apply(Encoding.XOR, bomb, np.zeros(64, np.uint8), 2)


@pytest.mark.parametrize("nbytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1])
def test_pieces_cover_a_tensor(nbytes: int) -> None:
    covered = [range(nbytes)[piece] for piece in pieces(nbytes)]
    assert [i for part in covered for i in (part.start, part.stop)][1:-1:2] == [part.start for part in covered[1:]]
    assert sum(map(len, covered)) == nbytes
