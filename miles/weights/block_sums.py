"""Checksums that a GPU computes where the weights are: sums over blocks of 64 bytes, exact in 64-bit integers.

xxh3 reads bytes one after the other, on the host, so weights in device memory would have to be copied there first. Here
every block is summed by itself, and sums are combined by position, so that any number of cores gives the same result:

    b_j = sum over the 16 words w of block j of key_i * w_i           words: little-endian, signed, 32 bits
    r_j = odd key of block j, by its position in the version's buffer
    checksum = sum of r_j * b_j, sum of r_j * r_j * b_j               over the tensor's blocks; modulo 2^64, big-endian

Tensors start at multiples of 64 bytes and gaps are zero, so a block belongs to one tensor; the last one is filled up
with zeros. Any change within one word is noticed; random damage is missed about once in 2^60 times. Nobody is kept from
constructing a collision, and xxh3 would not either: this guards against wrong, torn and stale bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch

from miles.rpc.gen import policy_pb2
from miles.weights.manifest import ALIGNMENT

_PIECE_BLOCKS = 1 << 21
"""Blocks that are summed at once: 128 MB of weights, for which 256 MB are needed."""
_WORDS = ALIGNMENT // 4
_MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
"""Odd, with many bits set (splitmix64)."""
_LOW_HALF = (1 << 32) - 1


def block_checksums(flat: torch.Tensor, descriptors: Sequence[policy_pb2.TensorDescriptor], base: int) -> list[bytes]:
    """The checksum of each descriptor's bytes in `flat`, uint8 (n,), whose first byte is the version's byte `base`.

    The gaps between the tensors must be zero. Waits once for the device.
    """
    first = base // ALIGNMENT
    begins = [descriptor.offset // ALIGNMENT - first for descriptor in descriptors]
    ends = [begin + -(-descriptor.nbytes // ALIGNMENT) for begin, descriptor in zip(begins, descriptors, strict=True)]
    sums = torch.zeros(len(descriptors), 2, dtype=torch.int64, device=flat.device)
    bounds = torch.tensor([begins, ends], device=flat.device)
    for at, blocks in _pieces(flat):
        running = _running_sums(blocks, first + at)
        here = (bounds - at).clamp_(0, len(blocks))
        sums += running[here[1]] - running[here[0]]
    return [struct.pack(">qq", *pair) for pair in sums.tolist()]


def block_checksum(tensor: torch.Tensor, offset: int) -> bytes:
    """The checksum of a tensor that lies at byte `offset` of a version's buffer."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    return block_checksums(flat, [policy_pb2.TensorDescriptor(offset=offset, nbytes=flat.numel())], offset)[0]


def _pieces(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Consecutive blocks, int32 (blocks, 16), with the index of the first; the last block is filled up with zeros."""
    whole = flat.numel() // ALIGNMENT
    blocks = flat[: whole * ALIGNMENT].view(torch.int32).view(-1, _WORDS)
    for at in range(0, whole, _PIECE_BLOCKS):
        yield at, blocks[at : at + _PIECE_BLOCKS]
    if rest := flat.numel() % ALIGNMENT:
        last = torch.zeros(ALIGNMENT, dtype=torch.uint8, device=flat.device)
        last[:rest] = flat[-rest:]
        yield whole, last.view(torch.int32).view(1, _WORDS)


def _running_sums(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """Both sums over the first i of these blocks, int64 (blocks + 1, 2); `first`: position of the first block."""
    keys = _mixed(torch.arange(1, _WORDS + 1, device=blocks.device))
    sums = (blocks * keys).sum(1)
    positions = torch.arange(first + 1, first + 1 + len(blocks), device=blocks.device)
    of_blocks = _mixed(positions.mul_(_signed(_MIX_B)))
    sums.mul_(of_blocks)
    running = torch.zeros(len(blocks) + 1, 2, dtype=torch.int64, device=blocks.device)
    torch.cumsum(sums, 0, out=running[1:, 0])
    torch.cumsum(sums.mul_(of_blocks), 0, out=running[1:, 1])
    return running


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Odd keys of 64 bits, one for each number; overwrites the numbers."""
    numbers.mul_(_signed(_MIX_A))
    numbers.bitwise_xor_(numbers.bitwise_right_shift(32).bitwise_and_(_LOW_HALF))
    return numbers.mul_(_signed(_MIX_B)).bitwise_or_(1)


def _signed(number: int) -> int:
    """The signed number of the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number
