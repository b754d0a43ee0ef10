"""Groups as bytes, as they are stored: `SampleGroup` messages with columns in place of samples.

Arrays are appended to the fields that protobuf has serialised, with a single copy: protobuf itself copies them several
times into a growing buffer. A group is checked when it is written; when it is read, its checksum is compared.
"""

from __future__ import annotations

import struct
from typing import Any

import xxhash
from google.protobuf.message import DecodeError

from miles.rpc.gen import sample_pb2 as pb
from miles.types.columns import arrays_of, columns_of, samples_from
from miles.types.convert import group_from_proto
from miles.types.errors import MalformedMessage
from miles.types.sample import Sample, SampleGroup
from miles.types.validate import check_group

_FIXED64, _LENGTH_DELIMITED = 1, 2
"""Wire types."""


def group_to_bytes(group: SampleGroup) -> bytes:
    """Serialise a group; equal groups give equal bytes. MalformedMessage when `check_group` refuses it."""
    if isinstance(group, StoredGroup) and group.payload is not None:
        return group.payload
    check_group(group)
    fields = pb.SampleGroup(job_id=group.job_id, group_id=group.group_id).SerializeToString()
    columns = columns_of(group.samples).SerializeToString(deterministic=True)
    arrays: list[Any] = arrays_of(group.samples)
    nbytes = sum([array.nbytes for array in arrays])
    begin = b"".join((fields, _COLUMNS, _varint(len(columns)), columns, _ARRAYS, _varint(nbytes)))
    end = b"".join((_ARRAYS_BYTES, _NUMBER.pack(nbytes), _CHECKSUM))
    checksum = xxhash.xxh3_64(begin)
    for part in (*arrays, end):
        checksum.update(part)
    return b"".join((begin, *arrays, end, _NUMBER.pack(checksum.intdigest())))


def group_from_bytes(payload: bytes | memoryview) -> SampleGroup:
    """Read a group that was written by `group_to_bytes`, or is a `SampleGroup` message with samples, which are checked.

    Samples of the former are decoded when they are first asked for. Arrays are read-only. Raises MalformedMessage when
    a field is wrong, and ValueError for bytes that are not a SampleGroup message.
    """
    if len(payload) < _END.size:
        return _from_message(payload)
    _, nbytes, _, checksum = _END.unpack_from(payload, len(payload) - _END.size)
    view = memoryview(payload)
    if xxhash.xxh3_64_intdigest(view[: -_NUMBER.size]) != checksum:
        return _from_message(payload)
    return StoredGroup(payload, nbytes)


class StoredGroup(SampleGroup):
    """A group as it was written, whose samples are decoded when they are first asked for."""

    __slots__ = ("_begin", "_message", "_payload", "_samples")

    def __init__(self, payload: bytes | memoryview, arrays_bytes: int) -> None:
        """Take bytes whose checksum is right."""
        self._begin = len(payload) - _END.size - arrays_bytes
        fields_end = self._begin - len(_ARRAYS) - len(_varint(arrays_bytes))
        self._message = pb.SampleGroup.FromString(bytes(payload[:fields_end]))
        self._payload = payload
        self._samples: list[Sample] | None = None
        self.job_id = self._message.job_id
        self.group_id = self._message.group_id

    @property
    def payload(self) -> bytes | None:
        """The bytes that it was read from; None once something saw the samples, and may have changed them."""
        return bytes(self._payload) or None

    @property
    def samples(self) -> list[Sample]:  # type: ignore[override]  # as good as the attribute
        """In order of `Sample.index`."""
        if self._samples is None:
            data = memoryview(self._payload)[self._begin : -_END.size]
            self._samples = samples_from(self.group_id, self._message.columns, data)
            self._payload, self._message = b"", pb.SampleGroup()  # arrays of experts keep what they view
        return self._samples


def _from_message(payload: bytes | memoryview) -> SampleGroup:
    message = pb.SampleGroup()
    try:
        message.ParseFromString(bytes(payload))
    except DecodeError as error:
        raise ValueError(f"not a SampleGroup message: {error}") from error
    if message.HasField("columns"):
        raise MalformedMessage("checksum", "another than when the group was written: its bytes have changed")
    return group_from_proto(message)


def _tag(field: str, wire_type: int) -> bytes:
    return _varint(pb.SampleGroup.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type)


def _varint(number: int) -> bytes:
    """Encode a number in base 128, least significant digit first; the top bit marks all digits but the last."""
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_COLUMNS, _ARRAYS = _tag("columns", _LENGTH_DELIMITED), _tag("arrays", _LENGTH_DELIMITED)
_ARRAYS_BYTES, _CHECKSUM = _tag("arrays_bytes", _FIXED64), _tag("checksum", _FIXED64)
_NUMBER = struct.Struct("<Q")
_END = struct.Struct("<cQcQ")
"""The last two fields, whose tags have one byte each."""
