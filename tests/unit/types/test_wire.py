"""Groups as bytes are `SampleGroup` messages with columns in place of samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_strategies import groups

from miles.rpc.gen import sample_pb2 as pb
from miles.types import MalformedMessage, Sample, SampleGroup, SampleStatus, VersionSpan
from miles.types.convert import group_from_proto, group_to_proto
from miles.types.wire import group_from_bytes, group_to_bytes


@settings(deadline=None, max_examples=100)
@given(groups())
def test_a_group_survives_its_bytes(group: SampleGroup) -> None:
    wire = group_to_bytes(group)
    assert group_from_bytes(wire) == group
    assert group_to_bytes(group_from_bytes(wire)) == wire


@settings(deadline=None, max_examples=50)
@given(groups())
def test_the_bytes_are_a_message_that_protobuf_reads(group: SampleGroup) -> None:
    message = pb.SampleGroup.FromString(group_to_bytes(group))
    assert (message.job_id, message.group_id) == (group.job_id, group.group_id)
    assert list(message.columns.response) == [sample.response for sample in group.samples]
    assert message.arrays.startswith(b"".join(sample.tokens.tobytes() for sample in group.samples))
    assert message.arrays_bytes == len(message.arrays)


@settings(deadline=None, max_examples=50)
@given(groups())
def test_a_message_with_samples_is_read_too(group: SampleGroup) -> None:
    assert group_from_bytes(group_to_proto(group).SerializeToString()) == group


@settings(deadline=None, max_examples=50)
@given(groups(), st.data())
def test_no_byte_can_change_unseen(group: SampleGroup, data: st.DataObject) -> None:
    wire = bytearray(group_to_bytes(group))
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"checksum|columns|not a SampleGroup message"):
        group_from_bytes(bytes(wire))


def group_of(**changes: object) -> SampleGroup:
    sample = Sample(
        group_id=1,
        index=0,
        prompt="p",
        tokens=np.arange(6, dtype=np.int32),
        response_length=3,
        status=SampleStatus.COMPLETED,
        weight_versions=(VersionSpan(0, 0, 3),),
    )
    for name, value in changes.items():
        setattr(sample, name, value)
    return SampleGroup("job", 1, [sample])


@pytest.mark.parametrize("size", [1, 30, 4000, 70_000])
def test_sizes_around_the_lengths_of_varints(size: int) -> None:
    experts = np.arange(5 * size, dtype=np.uint16).reshape(5, size, 1)
    group = group_of(rollout_routed_experts=experts, response="x" * size)
    assert group_from_bytes(group_to_bytes(group)) == group


def test_views_that_are_not_contiguous_are_written_in_order() -> None:
    experts = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(2, 4, 5).T
    tokens = np.arange(12, dtype=np.int32)[::2]
    group = group_of(rollout_routed_experts=experts, tokens=tokens)
    assert group_from_bytes(group_to_bytes(group)) == group


def test_arrays_are_read_only_and_aligned() -> None:
    log_probs = -np.ones(3, np.float32)
    for job_id in ("a", "ab"):  # moves all fields by a byte
        group = group_of(rollout_routed_experts=np.ones((5, 1, 1), np.uint16), rollout_log_probs=log_probs)
        group.job_id = job_id
        (sample,) = group_from_bytes(group_to_bytes(group)).samples
        for array in (sample.tokens, sample.rollout_log_probs, sample.rollout_routed_experts):
            assert array is not None
            assert array.flags.aligned
            assert not array.flags.writeable


def test_what_is_equal_in_all_samples_is_written_once_and_read_as_their_own() -> None:
    first = group_of(prompt=[{"role": "user", "content": "a" * 500}], metadata={"n": 1}, label="b" * 500).samples[0]
    group = SampleGroup("job", 1, [first, dataclasses.replace(first, index=1)])
    wire = group_to_bytes(group)
    assert wire.count(b"a" * 500) == wire.count(b"b" * 500) == 1
    one, other = group_from_bytes(wire).samples
    one.metadata["n"] = 2
    assert isinstance(one.prompt, list)
    one.prompt[0]["role"] = "system"
    assert (other.metadata, other.prompt) == (first.metadata, first.prompt)


def test_samples_are_decoded_when_they_are_asked_for_and_the_bytes_passed_on_until_then() -> None:
    wire = group_to_bytes(group_of())
    group = group_from_bytes(wire)
    assert (group.job_id, group.group_id) == ("job", 1)
    assert group_to_bytes(group) is wire
    assert group.samples is group.samples
    group.samples[0].reward = 1.0
    assert group_from_bytes(group_to_bytes(group)).samples[0].reward == 1.0


def test_a_message_with_columns_is_refused_without_its_checksum() -> None:
    message = pb.SampleGroup.FromString(group_to_bytes(group_of()))
    message.ClearField("checksum")
    with pytest.raises(MalformedMessage, match=r"^checksum: "):
        group_from_bytes(message.SerializeToString())
    with pytest.raises(MalformedMessage, match=r"^group\.columns: "):
        group_from_proto(message, "group.")


def test_a_fault_is_named_by_sample_and_field() -> None:
    group = group_of(metadata={"a": (1, 2)})
    with pytest.raises(MalformedMessage) as caught:
        group_to_bytes(group)
    assert caught.value.field == "samples[0].metadata"
    group = group_of(rollout_log_probs=np.array([0, np.inf, 0], np.float32))
    with pytest.raises(MalformedMessage, match=r"^samples\[0\]\.rollout_log_probs: entry 1 is inf"):
        group_to_bytes(group)
