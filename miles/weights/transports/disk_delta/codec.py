"""The encodings of a tensor's changes: pieces of XOR or of changed elements, each one zstd frame.

Mostly the low-order bytes of elements change, so their bytes are split into planes (all first bytes, then all second
bytes, ...) before compression: with 2 % of bfloat16 values changed, about 2.4 % of the bytes remain.
"""

from __future__ import annotations

import enum
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np

from miles.weights.manifest import ManifestError

if TYPE_CHECKING:
    from typing import TypeAlias

Bytes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"

PIECE_BYTES = 8 << 20
"""Pieces of a tensor are encoded separately, so that all CPUs share a large one. A multiple of every element size."""

_LEVEL = 1
_COUNT = struct.Struct("<I")
_local = threading.local()


class Encoding(enum.Enum):
    """How the bytes of a tensor are stored; the values are written to files."""

    RAW = "raw"
    """The bytes themselves, with the tensor's own dtype and shape."""
    XOR = "xor"
    """Per piece: new XOR old, split into planes, compressed."""
    OVERWRITE = "overwrite"
    """Per piece: count, distances between changed elements, and their new values; split into planes, compressed."""
    SAME = "same"
    """Nothing changed, so nothing is stored."""


def pieces(nbytes: int) -> list[slice]:
    """The pieces of a tensor of that size."""
    return [slice(begin, min(begin + PIECE_BYTES, nbytes)) for begin in range(0, nbytes, PIECE_BYTES)]


def encode(encoding: Encoding, old: Bytes, new: Bytes, itemsize: int) -> bytes:
    """Encode a piece's change as one zstd frame, empty when there is none. `itemsize`: of an element, in bytes."""
    if encoding is Encoding.XOR:
        change = np.bitwise_xor(_words(old), _words(new)).view(np.uint8) if old.size % 8 == 0 else old ^ new
        if not _words(change).any():
            return b""
        return _compress(_split(change, itemsize))
    old_elements, new_elements = old.view(f"<u{itemsize}"), new.view(f"<u{itemsize}")
    positions = np.flatnonzero(old_elements != new_elements).astype("<u4")
    if not positions.size:
        return b""
    distances = np.diff(positions, prepend=np.uint32(0)).view(np.uint8)
    values = new_elements[positions].view(np.uint8)
    head = np.frombuffer(_COUNT.pack(positions.size), np.uint8)
    return _compress(np.concatenate([head, _split(distances, 4), _split(values, itemsize)]))


def apply(encoding: Encoding, frame: bytes | bytearray, target: Bytes, itemsize: int) -> None:
    """Turn a piece's old bytes in `target` into its new ones; ManifestError when the frame is damaged."""
    if not len(frame):
        return
    if encoding is Encoding.XOR:
        change = _decompress(frame, target.size)
        if change.size != target.size:
            raise ManifestError(f"a change has {change.size} bytes where {target.size} are to be changed")
        for number, plane in enumerate(change.reshape(itemsize, -1)):
            if plane.any():  # high-order bytes hardly ever change
                place = target[number::itemsize]
                np.bitwise_xor(place, plane, out=place)
        return
    elements = target.view(f"<u{itemsize}")
    stored = _decompress(frame, _COUNT.size + elements.size * (4 + itemsize))
    count = int(_COUNT.unpack_from(stored.data)[0]) if stored.size >= _COUNT.size else -1
    if stored.size != _COUNT.size + count * (4 + itemsize):
        raise ManifestError(f"a change of {count} elements has {stored.size} bytes")
    middle = _COUNT.size + 4 * count
    positions = np.cumsum(_join(stored[_COUNT.size : middle], 4).view("<u4"), dtype=np.uint64)
    if count and int(positions[-1]) >= elements.size:
        raise ManifestError(f"a change is to element {int(positions[-1])} of {elements.size}")
    elements[positions] = _join(stored[middle:], itemsize).view(f"<u{itemsize}")


def _split(data: Bytes, itemsize: int) -> Bytes:
    """Elements' bytes as planes."""
    return data if itemsize == 1 else np.ascontiguousarray(data.reshape(-1, itemsize).T).reshape(-1)


def _join(data: Bytes, itemsize: int) -> Bytes:
    """Planes as elements' bytes."""
    if data.size % itemsize:
        raise ManifestError(f"a change of elements of {itemsize} bytes has {data.size} bytes")
    return data if itemsize == 1 else np.ascontiguousarray(data.reshape(itemsize, -1).T).reshape(-1)


def _words(data: Bytes) -> np.ndarray[tuple[int], np.dtype[np.uint64]] | Bytes:
    """The same memory in words of eight bytes if its size allows, which is faster."""
    return data.view(np.uint64) if data.size % 8 == 0 else data


def _compress(data: Bytes) -> bytes:
    import zstandard

    if not hasattr(_local, "compressor"):  # one per thread: they must not be shared
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    return bytes(_local.compressor.compress(data.data))


def _decompress(frame: bytes | bytearray, limit: int) -> Bytes:
    """Decompress a frame of at most `limit` bytes; ManifestError for a damaged frame or one that claims more."""
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        claimed = zstandard.frame_content_size(frame)
        if not 0 <= claimed <= limit:
            raise ManifestError(f"a compressed change claims to hold {claimed} bytes; there is room for {limit}")
        content = _local.decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        raise ManifestError(f"a compressed change is damaged: {error}") from error
    return np.frombuffer(content, np.uint8)
