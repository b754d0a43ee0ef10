"""Lossless conversion of samples to and from protobuf messages.

Decoded arrays are read-only views of the received bytes; encoded arrays are copied once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from miles.rpc.gen import sample_pb2 as pb
from miles.types.errors import MalformedMessage, prefixed
from miles.types.sample import (
    PrefixCacheStats,
    Prompt,
    Reward,
    Sample,
    SampleGroup,
    SampleStatus,
    SpeculativeStats,
    VersionSpan,
)
from miles.types.validate import check_group, check_sample, check_samples

STATUS_TO_PROTO = {status: pb.SampleStatus.Value(f"SAMPLE_STATUS_{status.name}") for status in SampleStatus}
STATUS_FROM_PROTO = {number: status for status, number in STATUS_TO_PROTO.items()}

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_UINT8: np.dtype("<u1"),
    pb.DTYPE_UINT16: np.dtype("<u2"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
    pb.DTYPE_INT8: np.dtype("<i1"),
    pb.DTYPE_BOOL: np.dtype("?"),
}
"""The data types of arrays; bfloat16 and float8 occur only in weights, never in an Array."""
_DTYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}

ARRAYS: tuple[tuple[Any, tuple[np.dtype[Any], ...], int], ...] = (
    ("tokens", (np.dtype("<i4"),), 1),
    ("loss_mask", (np.dtype("<u1"),), 1),
    ("rollout_log_probs", (np.dtype("<f4"),), 1),
    ("rollout_routed_experts", (np.dtype("<u1"), np.dtype("<u2")), 3),
    ("teacher_log_probs", (np.dtype("<f4"),), 1),
    ("teacher_tokens", (np.dtype("<i4"),), 2),
    ("teacher_token_log_probs", (np.dtype("<f4"),), 2),
)
"""Array fields of a sample: name, allowed types, dimensions."""


def array_to_proto(array: npt.NDArray[Any], path: str = "array") -> pb.Array:
    """Encode an array of any shape; MalformedMessage for an element type that DType lacks."""
    message = pb.Array()
    _fill_array(message, array, path)
    return message


def _fill_array(message: pb.Array, array: npt.NDArray[Any], path: str) -> None:
    little_endian = array.dtype.newbyteorder("<")
    number = _DTYPE_NUMBERS.get(little_endian)
    if number is None:
        raise MalformedMessage(path, f"dtype {array.dtype} cannot be sent; allowed: {_names(_DTYPES.values())}")
    message.data = array.astype(little_endian, copy=False).tobytes()
    message.dtype = cast("pb.DType.ValueType", number)
    message.shape.extend(array.shape)


def array_from_proto(
    message: pb.Array, path: str = "array", *, dtypes: Collection[npt.DTypeLike] | None = None, ndim: int | None = None
) -> npt.NDArray[Any]:
    """Decode an array as a read-only view of its bytes.

    `dtypes` and `ndim`, when given, are what is allowed. Raises MalformedMessage when the message has another type or
    number of dimensions, or when its bytes do not match its shape.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None or (dtypes is not None and dtype not in dtypes):
        name = pb.DType.Name(message.dtype) if message.dtype in pb.DType.values() else f"number {message.dtype}"
        raise MalformedMessage(f"{path}.dtype", f"{name}; expected {_names(dtypes or _DTYPES.values())}")
    sizes, data = message.shape, message.data
    if len(sizes) == 1 == ndim and sizes[0] * dtype.itemsize == len(data):
        return np.frombuffer(data, dtype)
    shape = tuple(sizes)
    expected_ndim = len(shape) if ndim is None else ndim
    if len(shape) != expected_ndim or expected_ndim > 32:
        raise MalformedMessage(f"{path}.shape", f"{len(shape)} dimensions; expected {min(expected_ndim, 32)}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise MalformedMessage(path, f"{len(data)} bytes, but shape {shape} of {dtype.name} takes "
                               f"{math.prod(shape) * dtype.itemsize}")  # fmt: skip
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, OverflowError) as error:  # an empty array with dimensions beyond what an array can have
        raise MalformedMessage(f"{path}.shape", f"{shape} is too large") from error


def sample_to_proto(sample: Sample, path: str = "") -> pb.Sample:
    """Encode a sample; MalformedMessage, its field prefixed by `path`, when `check_sample` refuses it."""
    check_sample(sample, path)
    message = pb.Sample()
    _encode_sample(sample, message, path)
    return message


def encode_samples(samples: Sequence[Sample], messages: Any) -> None:
    """Append samples to a repeated field; MalformedMessage when `check_sample` refuses one of them."""
    check_samples(samples)
    for sample in samples:
        _encode_sample(sample, messages.add(), "")


def sample_from_proto(message: pb.Sample, path: str = "") -> Sample:
    """Decode and check a sample. Raises MalformedMessage; `path` prefixes field names (end it with a dot)."""
    sample = decode_sample(message, path)
    check_sample(sample, path)
    return sample


def group_to_proto(group: SampleGroup, path: str = "") -> pb.SampleGroup:
    """Encode a group; MalformedMessage when `check_group` refuses it."""
    check_group(group, path)
    message = pb.SampleGroup(job_id=group.job_id, group_id=group.group_id)
    for i, sample in enumerate(group.samples):
        _encode_sample(sample, message.samples.add(), f"{path}samples[{i}].")
    return message


def encode_pending_group(group: SampleGroup, message: pb.SampleGroup) -> None:
    """Write a group of prompts, without responses, into an empty message; unchecked: whoever decodes it checks it."""
    message.job_id, message.group_id = group.job_id, group.group_id
    for sample in group.samples:
        encode_fields(sample, encoded := message.samples.add())
        _fill_array(encoded.tokens, sample.tokens, "tokens")


def group_from_proto(message: pb.SampleGroup, path: str = "") -> SampleGroup:
    """Decode and check a group. Raises MalformedMessage; `path` prefixes field names (end it with a dot)."""
    if message.HasField("columns"):
        raise MalformedMessage(
            f"{path}columns", "set without the size and checksum that end the bytes of stored groups"
        )
    samples = [decode_sample(sample, f"{path}samples[{i}].") for i, sample in enumerate(message.samples)]
    group = SampleGroup(message.job_id, message.group_id, samples)
    check_group(group, path)
    return group


def reward_to_proto(reward: Reward) -> pb.Reward:
    """Encode a reward as one value or as named ones; the numbers are not checked."""
    if isinstance(reward, dict):
        return pb.Reward(named=pb.NamedRewards(values={name: float(value) for name, value in reward.items()}))
    return pb.Reward(value=float(reward))


def reward_from_proto(message: pb.Reward, path: str = "reward") -> Reward:
    """Decode a reward; MalformedMessage when it is empty. `check_sample` checks that it is finite."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise MalformedMessage(path, "set neither value nor named; leave the reward absent until scored")
    return message.value if kind == "value" else dict(message.named.values)


def json_to_text(value: Any, path: str) -> str:
    """Encode a JSON value; MalformedMessage for one that JSON cannot represent without loss."""
    try:
        _check_json(value, path)
        text = _ENCODER.encode(value)
        text.encode()
    except RecursionError as error:
        raise MalformedMessage(path, "nested too deeply for JSON") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, MalformedMessage):
            raise
        raise MalformedMessage(path, f"not JSON: {error}") from error
    return text


def json_from_text(text: str, path: str) -> Any:
    """Decode strict JSON (no NaN, no infinity, no lone surrogates); MalformedMessage when it is not."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # an escape may be a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise MalformedMessage(path, "nested too deeply for JSON") from error
    except ValueError as error:
        raise MalformedMessage(path, f"not JSON: {error}") from error
    return value


def encode_fields(sample: Sample, message: pb.Sample) -> None:
    """Write all but the arrays of a checked sample into an empty message. Errors name fields of the sample."""
    message.group_id = sample.group_id
    message.index = sample.index
    message.response_length = sample.response_length
    message.response = sample.response
    message.status = STATUS_TO_PROTO[sample.status]
    message.metadata_json = json_to_text(sample.metadata, "metadata") if sample.metadata else "{}"
    message.remove_sample = sample.remove_sample
    for span in sample.weight_versions:
        message.weight_versions.add(version=span.version, start=span.start, end=span.end)
    if sample.label is not None:
        message.label = sample.label
    if isinstance(sample.prompt, str):
        message.prompt_text = sample.prompt
    else:
        message.prompt_messages_json = json_to_text(sample.prompt, "prompt")
    if isinstance(sample.reward, dict):
        message.reward.CopyFrom(reward_to_proto(sample.reward))
    elif sample.reward is not None:
        message.reward.value = sample.reward
    if (speculative := sample.speculative) is not None:
        message.speculative.CopyFrom(
            pb.SpeculativeStats(
                accepted_draft_tokens=speculative.accepted_draft_tokens,
                proposed_draft_tokens=speculative.proposed_draft_tokens,
                verify_count=speculative.verify_count,
            )
        )
    if (cache := sample.prefix_cache) is not None:
        message.prefix_cache.CopyFrom(
            pb.PrefixCacheStats(cached_tokens=cache.cached_tokens, prompt_tokens=cache.prompt_tokens)
        )


def _encode_sample(sample: Sample, message: pb.Sample, path: str) -> None:
    """Write a checked sample into an empty message, in place: copying a message doubles the cost."""
    with prefixed(path):
        encode_fields(sample, message)
        for name, _, _ in ARRAYS:
            array = getattr(sample, name)
            if array is not None:
                _fill_array(getattr(message, name), array, name)


def decode_sample(message: pb.Sample, path: str = "") -> Sample:
    """Decode a sample without `check_sample`. Raises MalformedMessage for what cannot be decoded."""
    with prefixed(path):
        return _decode(message)


def _decode(message: pb.Sample) -> Sample:
    status = STATUS_FROM_PROTO.get(message.status)
    if status is None:
        raise MalformedMessage("status", f"unknown value {message.status}")
    sample = Sample(
        group_id=message.group_id,
        index=message.index,
        prompt=_decode_prompt(message),
        response_length=message.response_length,
        response=message.response,
        label=message.label if message.HasField("label") else None,
        reward=reward_from_proto(message.reward) if message.HasField("reward") else None,
        status=status,
        metadata=_decode_metadata(message.metadata_json),
        weight_versions=tuple([VersionSpan(s.version, s.start, s.end) for s in message.weight_versions]),
        remove_sample=message.remove_sample,
    )
    for name, dtypes, ndim in ARRAYS:
        if message.HasField(name):
            setattr(sample, name, array_from_proto(getattr(message, name), name, dtypes=dtypes, ndim=ndim))
    if message.HasField("speculative"):
        stats = message.speculative
        sample.speculative = SpeculativeStats(
            stats.accepted_draft_tokens, stats.proposed_draft_tokens, stats.verify_count
        )
    if message.HasField("prefix_cache"):
        sample.prefix_cache = PrefixCacheStats(message.prefix_cache.cached_tokens, message.prefix_cache.prompt_tokens)
    return sample


def _decode_prompt(message: pb.Sample) -> Prompt:
    if message.HasField("prompt_text"):
        return message.prompt_text
    if not message.HasField("prompt_messages_json"):
        raise MalformedMessage("prompt", "missing; set prompt_text or prompt_messages_json")
    messages = json_from_text(message.prompt_messages_json, "prompt_messages_json")
    if not isinstance(messages, list) or not all(isinstance(entry, dict) for entry in messages):
        raise MalformedMessage("prompt_messages_json", "not a JSON list of objects")
    return messages


def _decode_metadata(text: str) -> dict[str, Any]:
    metadata = json_from_text(text, "metadata_json") if text not in ("", "{}") else {}
    if not isinstance(metadata, dict):
        raise MalformedMessage("metadata_json", f"a JSON {type(metadata).__name__}; expected an object")
    return metadata


def _check_json(value: Any, path: str) -> None:
    """Refuse values that json.dumps would change silently: keys that are not text, and tuples."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise MalformedMessage(path, f"key {key!r} is not text; JSON would convert it")
            _check_json(entry, path)
    elif isinstance(value, list):
        for entry in value:
            _check_json(entry, path)
    elif isinstance(value, tuple):
        raise MalformedMessage(path, "holds a tuple, which JSON would convert to a list")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond the range of a double")
    return value


_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float)
"""Created once: json.dumps and json.loads with options create one per call, which costs more than a small object."""


def _names(dtypes: Iterable[npt.DTypeLike]) -> str:
    return " or ".join(np.dtype(dtype).name for dtype in dtypes)
