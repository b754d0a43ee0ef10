"""Hostile bytes end in DecodeError or MalformedMessage, and in nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_strategies import groups, json_values

from miles.rpc.gen import sample_pb2 as pb
from miles.types import MalformedMessage, Sample, SampleGroup
from miles.types.convert import array_from_proto, group_from_proto, group_to_proto, sample_from_proto, sample_to_proto

fuzz = settings(deadline=None, max_examples=150)


def decode(wire: bytes) -> None:
    """Decode; what is accepted must survive the wire from then on."""
    try:
        group = group_from_proto(pb.SampleGroup.FromString(wire))
    except (DecodeError, MalformedMessage):
        return
    assert group_from_proto(group_to_proto(group)) == group


@fuzz
@given(st.binary(max_size=200))
def test_random_bytes(wire: bytes) -> None:
    decode(wire)


@fuzz
@given(groups(), st.data())
def test_mutated_messages(group: SampleGroup, data: st.DataObject) -> None:
    wire = bytearray(group_to_proto(group).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire)))
        length = data.draw(st.integers(0, 3))
        wire[at : at + length] = data.draw(st.binary(max_size=3))
    decode(bytes(wire))


numbers = st.sampled_from([0, 1, 2, 3, 5, 2**31, 2**32 - 1])
arrays: st.SearchStrategy[pb.Array] = st.builds(
    pb.Array,
    data=st.binary(max_size=12),
    dtype=st.integers(0, 13),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**31, 2**63, 2**64 - 1]), max_size=4),
)
json_texts = st.text(max_size=5) | st.sampled_from(["{}", "[]", '{"a":NaN}', "[{}]", "[" * 5000, '"\\ud800"'])
proto_samples: st.SearchStrategy[pb.Sample] = st.builds(
    lambda prompt, arrays, **fields: pb.Sample(**prompt, **arrays, **fields),
    prompt=st.fixed_dictionaries({}, optional={"prompt_text": st.text(max_size=3)})
    | st.fixed_dictionaries({"prompt_messages_json": json_texts}),
    arrays=st.fixed_dictionaries(
        {},
        optional={
            "tokens": arrays,
            "loss_mask": arrays,
            "rollout_log_probs": arrays,
            "rollout_routed_experts": arrays,
            "teacher_log_probs": arrays,
            "teacher_tokens": arrays,
            "teacher_token_log_probs": arrays,
        },
    ),
    response_length=numbers,
    status=st.integers(-1, 7),
    metadata_json=json_texts,
    weight_versions=st.lists(st.builds(pb.VersionSpan, version=numbers, start=numbers, end=numbers), max_size=2),
    reward=st.none() | st.builds(pb.Reward) | st.builds(pb.Reward, value=st.floats()),
)


@fuzz
@given(st.lists(proto_samples, max_size=2))
def test_well_formed_messages_with_senseless_contents(samples: list[pb.Sample]) -> None:
    decode(pb.SampleGroup(samples=samples).SerializeToString())


@fuzz
@given(arrays)
@example(pb.Array(dtype=pb.DTYPE_UINT8, shape=[0] * 65))
@example(pb.Array(dtype=pb.DTYPE_UINT8, shape=[0, 2**64 - 1]))
@example(pb.Array(dtype=pb.DTYPE_BOOL, shape=[2**32, 2**32]))
def test_random_arrays(message: pb.Array) -> None:
    try:
        array = array_from_proto(message)
    except MalformedMessage:
        return
    assert array.shape == tuple(message.shape)
    assert array.nbytes == len(message.data)


@fuzz
@given(json_values)
def test_metadata_is_an_object(value: Any) -> None:
    sample = Sample(group_id=0, index=0, prompt="", metadata=value)
    if isinstance(value, dict):
        assert sample_from_proto(sample_to_proto(sample)) == sample
        return
    with pytest.raises(MalformedMessage) as caught:
        sample_to_proto(sample)
    assert caught.value.field == "metadata"
