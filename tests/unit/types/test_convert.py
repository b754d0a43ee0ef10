"""Samples survive the wire unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sample_strategies import groups, samples

from miles.rpc.gen import sample_pb2 as pb
from miles.types import MalformedMessage, Sample, SampleGroup, SampleStatus, VersionSpan
from miles.types.convert import (
    array_from_proto,
    array_to_proto,
    group_from_proto,
    group_to_proto,
    sample_from_proto,
    sample_to_proto,
)


@settings(deadline=None, max_examples=100)
@given(groups())
def test_a_group_survives_the_wire(group: SampleGroup) -> None:
    wire = group_to_proto(group).SerializeToString()
    assert group_from_proto(pb.SampleGroup.FromString(wire)) == group


@settings(deadline=None)
@given(samples())
def test_a_decoded_sample_encodes_to_the_same_message(sample: Sample) -> None:
    message = sample_to_proto(sample)
    assert sample_to_proto(sample_from_proto(message)) == message


@pytest.mark.parametrize(
    "change",
    [
        {"index": 1},
        {"tokens": np.array([1, 3], np.int32)},
        {"tokens": np.array([1, 2], np.int64)},
        {"loss_mask": np.ones(1, np.uint8)},
        {"rollout_log_probs": None},
        {"rollout_log_probs": np.array([-2], np.float32)},
        {"reward": 0.0},
        {"weight_versions": (VersionSpan(1, 0, 1),)},
    ],
)
def test_samples_that_differ_in_one_field_are_not_equal(change: dict[str, Any]) -> None:
    def make() -> Sample:
        return Sample(
            group_id=1,
            index=0,
            prompt="",
            tokens=np.array([1, 2], np.int32),
            response_length=1,
            rollout_log_probs=np.array([-1], np.float32),
            weight_versions=(VersionSpan(0, 0, 1),),
        )

    changed = make()
    for name, value in change.items():
        setattr(changed, name, value)
    assert make() == make()
    assert changed != make()


DTYPES = [np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float16, np.float64, np.int8, np.bool_]


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    )
)
def test_an_array_of_any_type_and_shape_survives_the_wire(array: np.ndarray) -> None:
    decoded = array_from_proto(pb.Array.FromString(array_to_proto(array).SerializeToString()))
    assert decoded.dtype == array.dtype
    assert decoded.shape == array.shape
    assert decoded.tobytes() == array.tobytes()


def test_arrays_travel_little_endian_and_row_major() -> None:
    message = array_to_proto(np.array([[1, 2], [3, 4]], ">u2").T)
    assert message.data == b"\x01\x00\x03\x00\x02\x00\x04\x00"
    assert message.dtype == pb.DTYPE_UINT16
    assert list(message.shape) == [2, 2]


def test_decoded_arrays_are_views_that_cannot_be_written() -> None:
    decoded = array_from_proto(array_to_proto(np.arange(4, dtype=np.int32)))
    assert decoded.base is not None
    with pytest.raises(ValueError, match="read-only"):
        decoded[0] = 1


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]", "uint32", "O"])
def test_an_array_of_a_type_without_a_number_is_refused(dtype: str) -> None:
    with pytest.raises(MalformedMessage, match="cannot be sent"):
        array_to_proto(np.zeros(2, dtype))


def test_a_sample_that_was_not_generated_yet_holds_its_prompt_alone() -> None:
    sample = Sample(group_id=1, index=0, prompt="hello", tokens=np.array([5, 6], np.int32))
    decoded = sample_from_proto(sample_to_proto(sample))
    assert decoded == sample
    assert decoded.status is SampleStatus.PENDING
    assert decoded.prompt_tokens.tolist() == [5, 6]
    assert decoded.response_tokens.tolist() == []
    assert decoded.oldest_version is None


def test_a_partial_sample_keeps_its_response_so_far() -> None:
    sample = Sample(
        group_id=1,
        index=0,
        prompt="hello",
        tokens=np.array([5, 6, 7, 8, 9], np.int32),
        response_length=3,
        rollout_log_probs=np.array([-1, -2, -3], np.float32),
        weight_versions=(VersionSpan(4, 0, 2), VersionSpan(3, 2, 3)),
    )
    decoded = sample_from_proto(sample_to_proto(sample))
    assert decoded == sample
    assert decoded.response_tokens.tolist() == [7, 8, 9]
    assert decoded.oldest_version == 3


def test_a_failed_sample_needs_no_reward() -> None:
    sample = Sample(
        group_id=1, index=0, prompt="hello", status=SampleStatus.FAILED, metadata={"error": "reward timed out"}
    )
    assert sample_from_proto(sample_to_proto(sample)) == sample


def test_a_group_is_as_old_as_its_oldest_token() -> None:
    tokens = np.array([1, 2], np.int32)
    old = Sample(
        group_id=1, index=0, prompt="", tokens=tokens, response_length=1, weight_versions=(VersionSpan(2, 0, 1),)
    )
    new = Sample(
        group_id=1, index=1, prompt="", tokens=tokens, response_length=1, weight_versions=(VersionSpan(5, 0, 1),)
    )
    unborn = Sample(group_id=1, index=2, prompt="", tokens=tokens)
    assert SampleGroup("job", 1, [unborn, new, old]).oldest_version == 2
    assert SampleGroup("job", 1, [unborn]).oldest_version is None
