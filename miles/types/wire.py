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
from miles.types.sample import SampleGroup
from miles.types.validate import check_group

_FIXED64, _LENGTH_DELIMITED = 1, 2
"""Wire types."""


def group_to_bytes(group: SampleGroup) -> bytes:
    """Serialise a group; equal groups give equal bytes. MalformedMessage when `check_group` refuses it."""
    check_group(group)
    message = pb.SampleGroup(job_id=group.job_id, group_id=group.group_id, columns=columns_of(group.samples))
    arrays: list[Any] = arrays_of(group.samples)
    nbytes = sum([array.nbytes for array in arrays])
    fields = message.SerializeToString(deterministic=True)
    body = b"".join((fields, _ARRAYS, _varint(nbytes), *arrays, _ARRAYS_BYTES, _NUMBER.pack(nbytes), _CHECKSUM))
    return b"".join((body, _NUMBER.pack(_checksum(body))))


def group_from_bytes(payload: bytes) -> SampleGroup:
    """Read a group that was written by `group_to_bytes`, or is a `SampleGroup` message with samples, which are checked.

    Arrays are read-only. Raises MalformedMessage when a field is wrong, and ValueError for bytes that are not a
    SampleGroup message.
    """
    if len(payload) < _END.size:
        return _from_message(payload)
    _, nbytes, _, checksum = _END.unpack_from(payload, len(payload) - _END.size)
    view = memoryview(payload)
    if _checksum(view[: -_NUMBER.size]) != checksum:
        return _from_message(payload)
    end = len(payload) - _END.size
    begin = end - nbytes
    message = pb.SampleGroup.FromString(payload[: begin - len(_ARRAYS) - len(_varint(nbytes))])
    samples = samples_from(message.group_id, message.columns, view[begin:end])
    return SampleGroup(message.job_id, message.group_id, samples)


def _from_message(payload: bytes) -> SampleGroup:
    message = pb.SampleGroup()
    try:
        message.ParseFromString(payload)
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


_checksum = xxhash.xxh3_64_intdigest
_ARRAYS, _ARRAYS_BYTES = _tag("arrays", _LENGTH_DELIMITED), _tag("arrays_bytes", _FIXED64)
_CHECKSUM = _tag("checksum", _FIXED64)
_NUMBER = struct.Struct("<Q")
_END = struct.Struct("<cQcQ")
"""The last two fields, whose tags have one byte each."""
