"""Checksums of blocks: their definition, in any order and from any device."""

from __future__ import annotations

import struct

import pytest
import torch

from miles.rpc.gen import policy_pb2, sample_pb2
from miles.weights import block_sums
from miles.weights import manifest as manifests
from miles.weights.block_sums import block_checksum, block_checksums

MASK = (1 << 64) - 1


def mixed(number: int) -> int:
    number = number * 0x9E3779B97F4A7C15 & MASK
    return ((number ^ number >> 32) * 0xBF58476D1CE4E5B9 & MASK) | 1


def expected(data: bytes, offset: int) -> bytes:
    """The definition, block by block in Python's integers."""
    data += bytes(-len(data) % 64)
    first = second = 0
    for block in range(len(data) // 64):
        words = struct.unpack_from("<16i", data, 64 * block)
        total = sum(mixed(i + 1) * word for i, word in enumerate(words))
        key = mixed((offset // 64 + block + 1) * 0xBF58476D1CE4E5B9 & MASK)
        first, second = first + key * total, second + key * key * total
    return struct.pack(">QQ", first & MASK, second & MASK)


def version(*sizes: int) -> tuple[torch.Tensor, list[policy_pb2.TensorDescriptor]]:
    """Random bytes for tensors of these sizes, gaps zero, without what fills the last block up."""
    layout = [(f"t{i}", sample_pb2.DTYPE_UINT8, (size,)) for i, size in enumerate(sizes)]
    descriptors, total = manifests.plan(layout)
    flat = torch.zeros(total, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    for d in descriptors:
        data = torch.randint(0, 256, (d.nbytes,), dtype=torch.uint8, generator=generator)
        flat[d.offset : d.offset + d.nbytes] = data
    return flat, descriptors


@pytest.mark.parametrize("piece_blocks", [1, 7, 1 << 20])
def test_checksums_are_those_of_the_definition_whatever_the_pieces(
    piece_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_sums, "_PIECE_BLOCKS", piece_blocks)
    flat, descriptors = version(10, 2000, 0, 64, 66, 1)
    found = block_checksums(flat, descriptors, 0)
    assert found == [expected(bytes(flat[d.offset : d.offset + d.nbytes].tolist()), d.offset) for d in descriptors]


def test_a_bucket_and_a_tensor_by_itself_have_the_checksums_that_they_have_in_the_version() -> None:
    flat, descriptors = version(100, 640, 3)
    whole = block_checksums(flat, descriptors, 0)
    base = descriptors[1].offset
    assert block_checksums(flat[base:], descriptors[1:], base) == whole[1:]
    alone = [block_checksum(flat[d.offset : d.offset + d.nbytes].clone(), d.offset) for d in descriptors]
    assert alone == whole


@pytest.mark.parametrize("change", ["exchange two words", "exchange two blocks", "negate two values", "clear a block"])
def test_changes_that_leave_plain_sums_as_they_are_are_noticed(change: str) -> None:
    flat, descriptors = version(4096)
    before = block_checksums(flat, descriptors, 0)
    words = flat.view(torch.int32)
    if change == "exchange two words":
        words[3], words[4] = words[4].clone(), words[3].clone()
    elif change == "exchange two blocks":
        words[:16], words[16:32] = words[16:32].clone(), words[:16].clone()
    elif change == "negate two values":
        words[[3, 40]] ^= -(1 << 31)
    else:
        words[16:32] = 0
    assert block_checksums(flat, descriptors, 0) != before
