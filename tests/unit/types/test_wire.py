"""Groups as bytes are `SampleGroup` messages like any other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from sample_strategies import groups

from miles.rpc.gen import sample_pb2 as pb
from miles.types import MalformedMessage, Sample, SampleGroup, SampleStatus, VersionSpan
from miles.types.convert import group_from_proto, group_to_proto
from miles.types.wire import group_from_bytes, group_to_bytes


@settings(deadline=None, max_examples=150)
@given(groups())
def test_the_bytes_hold_the_message_that_protobuf_would_send(group: SampleGroup) -> None:
    wire = group_to_bytes(group)
    message = group_to_proto(group)
    assert pb.SampleGroup.FromString(wire) == message
    assert group_from_bytes(message.SerializeToString()) == group
    assert group_from_bytes(wire) == group
    assert group_to_bytes(group_from_bytes(wire)) == wire


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
    assert group_from_proto(pb.SampleGroup.FromString(group_to_bytes(group))) == group


def test_views_that_are_not_contiguous_are_written_in_order() -> None:
    experts = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(2, 4, 5).T
    tokens = np.arange(12, dtype=np.int32)[::2]
    group = group_of(rollout_routed_experts=experts, tokens=tokens)
    assert group_from_bytes(group_to_bytes(group)) == group


def test_a_fault_is_named_by_sample_and_field() -> None:
    group = group_of(metadata={"a": (1, 2)})
    with pytest.raises(MalformedMessage) as caught:
        group_to_bytes(group)
    assert caught.value.field == "samples[0].metadata"
    group = group_of(rollout_log_probs=np.array([0, np.inf, 0], np.float32))
    with pytest.raises(MalformedMessage, match=r"^samples\[0\]\.rollout_log_probs: entry 1 is inf"):
        group_to_bytes(group)
