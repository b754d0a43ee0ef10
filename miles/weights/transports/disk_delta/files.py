"""Files of a version's folder: safetensors, written in one pass and read in pieces.

    weight_v000012/
        part-000000000000.safetensors    one per bucket; the number is the bucket's offset in the version's buffer
        index.json                       the version, the base that it changes, and its files

A tensor that is stored raw has its own name, dtype and shape, so a full version is an ordinary safetensors checkpoint.
A change is stored as bytes: the frames of its pieces one after the other. The metadata hold encoding, frame lengths and
checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from miles.rpc.gen import sample_pb2
from miles.weights.manifest import DTYPE_BYTES, ManifestError
from miles.weights.transports.disk_delta.codec import Encoding

if TYPE_CHECKING:
    from typing_extensions import Buffer

INDEX = "index.json"
FORMAT = 1
_LONGEST_HEADER = 100 << 20

_DTYPE_NAME: dict[int, str] = {
    sample_pb2.DTYPE_UINT8: "U8",
    sample_pb2.DTYPE_UINT16: "U16",
    sample_pb2.DTYPE_INT32: "I32",
    sample_pb2.DTYPE_INT64: "I64",
    sample_pb2.DTYPE_FLOAT32: "F32",
    sample_pb2.DTYPE_FLOAT16: "F16",
    sample_pb2.DTYPE_BFLOAT16: "BF16",
    sample_pb2.DTYPE_FLOAT8_E4M3: "F8_E4M3",
    sample_pb2.DTYPE_FLOAT64: "F64",
    sample_pb2.DTYPE_INT8: "I8",
    sample_pb2.DTYPE_BOOL: "BOOL",
}
_DTYPE_NUMBER = {name: number for number, name in _DTYPE_NAME.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    name: str
    dtype: int
    """DType number."""
    shape: tuple[int, ...]
    encoding: Encoding
    checksum: bytes
    """xxh3-128 of the tensor's bytes once the change is applied."""
    frames: tuple[int, ...] = ()
    """Length of each piece's frame, in bytes; none when raw."""
    content: Sequence[Buffer] = ()
    """What to write: one buffer for each frame, or the tensor's bytes."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor itself, in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.nbytes if self.encoding is Encoding.RAW else sum(self.frames)


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """The version that a folder's changes apply to."""

    folder: str
    """Name of its folder, beside this one."""
    publication_id: int
    checksum: str
    """Of its manifest, in hex."""


@dataclasses.dataclass(frozen=True, slots=True)
class Index:
    """What a folder holds."""

    version: int
    publication_id: int
    checksum: str
    """Of the version's manifest, in hex."""
    base: Base | None
    """None for a full version."""
    files: dict[str, int]
    """Size of each file, in bytes, by name."""

    def write(self, folder: pathlib.Path) -> None:
        """Write it and flush it to disk."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        with (folder / INDEX).open("x") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: pathlib.Path) -> Index:
        """Read the index and check the files' sizes; raises OSError or ManifestError."""
        with _damaged_if_unreadable(folder / INDEX):
            content = json.loads((folder / INDEX).read_text())
            if content.pop("format") != FORMAT:
                raise ManifestError(f"{folder} has another format than {FORMAT}; use the same release on both sides")
            base = content.pop("base")
            index = cls(base=None if base is None else Base(**base), **content)
            sizes = {name: int(size) for name, size in index.files.items()}
        for name, size in sizes.items():
            if pathlib.PurePath(name).name != name:
                raise ManifestError(f"{folder / INDEX} names {name!r}, which is not a file of its own folder")
            actual = (folder / name).stat().st_size
            if actual != size:
                raise ManifestError(f"{folder / name} has {actual} bytes instead of {size}; it is truncated or damaged")
        return index


def write_file(path: pathlib.Path, tensors: Sequence[Stored]) -> int:
    """Write a safetensors file and flush it to disk; return its size in bytes. OSError when there is no room."""
    header: dict[str, Any] = {"__metadata__": {tensor.name: _metadata(tensor) for tensor in tensors}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.stored_nbytes
        raw = tensor.encoding is Encoding.RAW
        header[tensor.name] = {
            "dtype": _DTYPE_NAME[tensor.dtype] if raw else "U8",
            "shape": list(tensor.shape) if raw else [end - begin],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for part in tensor.content:
                _write_all(file.fileno(), part)
        os.fsync(file.fileno())  # some file systems report a full disk no earlier
    return 8 + len(text) + end


class Reader:
    """A file open for reading; any number of threads may read at once. ManifestError when the file is damaged.

    It reads instead of mapping: if a mapped file vanished from network storage, the process would crash.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._entries = self._parse()
            on_failure.pop_all()

    @property
    def tensors(self) -> list[Stored]:
        """The tensors in the file, without their bytes."""
        return [stored for stored, _ in self._entries.values()]

    def read_raw(self, name: str, piece: slice, target: memoryview) -> None:
        """Read a piece of a raw tensor into `target`."""
        self._read_into(self._entries[name][1] + piece.start, target)

    def read_frame(self, name: str, number: int) -> bytearray:
        """Read one frame of a changed tensor."""
        stored, begin = self._entries[name]
        frame = bytearray(stored.frames[number])
        self._read_into(begin + sum(stored.frames[:number]), memoryview(frame))
        return frame

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _read_into(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if got == 0:
                raise ManifestError(f"{self._path} ends at byte {offset + done}; it is truncated")
            done += got

    def _parse(self) -> dict[str, tuple[Stored, int]]:
        """Tensors by name, and where in the file their bytes begin."""
        path, size = self._path, os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise ManifestError(f"{path} is no safetensors file, or truncated: {size} bytes")
        with _damaged_if_unreadable(path):
            header = json.loads(os.pread(self._fd, length, 8))
            metadata = header.pop("__metadata__")
            stored = {name: _stored(name, entry, json.loads(metadata[name])) for name, entry in header.items()}
            places = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
        room = size - 8 - length
        for name, (begin, end) in places.items():
            if not 0 <= begin <= end <= room or end - begin != stored[name].stored_nbytes:
                raise ManifestError(f"{path}: {name!r} is said to lie in bytes {begin} to {end} of {room}")
        return {name: (stored[name], 8 + length + places[name][0]) for name in stored}


@contextlib.contextmanager
def _damaged_if_unreadable(path: pathlib.Path) -> Iterator[None]:
    """Turn what malformed JSON content raises into ManifestError."""
    try:
        yield
    except ManifestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _metadata(tensor: Stored) -> str:
    """A tensor's metadata, for which safetensors has no field of its own; metadata are strings."""
    content: dict[str, Any] = {"checksum": tensor.checksum.hex(), "encoding": tensor.encoding.value}
    if tensor.encoding is not Encoding.RAW:
        content |= {"dtype": _DTYPE_NAME[tensor.dtype], "shape": list(tensor.shape), "frames": list(tensor.frames)}
    return json.dumps(content)


def _stored(name: str, entry: dict[str, Any], own: dict[str, Any]) -> Stored:
    """A tensor as a header and its metadata describe it."""
    encoding = Encoding(own["encoding"])
    said = entry if encoding is Encoding.RAW else own
    stored = Stored(
        name=name,
        dtype=_DTYPE_NUMBER[said["dtype"]],
        shape=tuple(map(int, said["shape"])),
        encoding=encoding,
        checksum=bytes.fromhex(own["checksum"]),
        frames=tuple(map(int, own.get("frames", ()))),
    )
    if min((*stored.shape, *stored.frames), default=0) < 0:
        raise ValueError(f"{name!r} has a negative size")
    return stored


def _write_all(fd: int, data: Buffer) -> None:
    with memoryview(data) as whole:
        if not whole.nbytes:
            return
        view, done = whole.cast("B"), 0
        while done < len(view):
            done += os.write(fd, view[done : done + (64 << 20)])
