"""Whatever breaks the contract is refused, in both directions, by the name of its field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from miles.rpc.gen import sample_pb2 as pb
from miles.types import (
    MalformedMessage,
    PrefixCacheStats,
    Sample,
    SampleGroup,
    SampleStatus,
    SpeculativeStats,
    VersionSpan,
)
from miles.types.convert import array_to_proto, encode_samples, group_from_proto, group_to_proto, sample_to_proto
from miles.types.usual import is_usual


def whole_sample(index: int = 0) -> Sample:
    return Sample(
        group_id=7,
        index=index,
        prompt=[{"role": "user", "content": "2 + 2?"}],
        tokens=np.arange(5, dtype=np.int32),
        response_length=2,
        response="4",
        label="4",
        reward=1.0,
        loss_mask=np.ones(2, np.uint8),
        status=SampleStatus.COMPLETED,
        metadata={"source": "test"},
        rollout_log_probs=np.zeros(2, np.float32),
        rollout_routed_experts=np.zeros((4, 3, 2), np.uint8),
        weight_versions=(VersionSpan(0, 0, 1), VersionSpan(1, 1, 2)),
        speculative=SpeculativeStats(1, 2, 1),
        prefix_cache=PrefixCacheStats(1, 3),
        teacher_log_probs=np.zeros(2, np.float32),
        teacher_tokens=np.array([[4, -1], [2, 3]], np.int32),
        teacher_token_log_probs=np.zeros((2, 2), np.float32),
    )


def whole_group() -> SampleGroup:
    return SampleGroup("job", 7, [whole_sample(index) for index in range(3)])


def set_array(name: str, array: np.ndarray) -> Callable[[pb.Sample], None]:
    return lambda sample: getattr(sample, name).CopyFrom(array_to_proto(array))


def edit(statement: str) -> Callable[[pb.Sample], None]:
    return lambda sample: exec(statement, {"sample": sample, "pb": pb, "nan": float("nan"), "inf": float("inf")})


WIRE_FAULTS = [
    ("tokens.dtype", edit("sample.tokens.dtype = pb.DTYPE_INT64")),
    ("tokens.dtype", edit("sample.tokens.dtype = 99")),
    ("tokens.dtype", edit("sample.tokens.dtype = 0")),
    ("tokens", edit("sample.tokens.data += b'x'")),
    ("tokens", edit("sample.tokens.shape[0] = 6")),
    ("tokens", edit("sample.tokens.shape[0] = 2**64 - 1")),
    ("tokens.shape", edit("sample.tokens.shape.append(1)")),
    ("tokens.shape", edit("del sample.tokens.shape[:]")),
    ("tokens", set_array("tokens", np.array([1, 2, -3, 4, 5], np.int32))),
    ("response_length", edit("sample.response_length = 6")),
    ("response_length", edit("sample.ClearField('tokens')")),
    ("loss_mask", set_array("loss_mask", np.ones(3, np.uint8))),
    ("loss_mask", set_array("loss_mask", np.array([0, 2], np.uint8))),
    ("loss_mask.dtype", edit("sample.loss_mask.dtype = pb.DTYPE_BOOL")),
    ("rollout_log_probs", set_array("rollout_log_probs", np.zeros(1, np.float32))),
    ("rollout_log_probs", set_array("rollout_log_probs", np.array([0, np.nan], np.float32))),
    ("rollout_log_probs", set_array("rollout_log_probs", np.array([-np.inf, 0], np.float32))),
    ("rollout_log_probs.dtype", set_array("rollout_log_probs", np.zeros(2, np.float16))),
    ("teacher_log_probs", set_array("teacher_log_probs", np.zeros(3, np.float32))),
    ("teacher_tokens", set_array("teacher_tokens", np.zeros((3, 2), np.int32))),
    ("teacher_tokens.dtype", set_array("teacher_tokens", np.zeros((2, 2), np.int64))),
    ("teacher_token_log_probs", set_array("teacher_token_log_probs", np.zeros((2, 3), np.float32))),
    ("teacher_token_log_probs", set_array("teacher_token_log_probs", np.full((2, 2), np.nan, np.float32))),
    ("rollout_routed_experts", set_array("rollout_routed_experts", np.zeros((5, 3, 2), np.uint8))),
    ("rollout_routed_experts.shape", set_array("rollout_routed_experts", np.zeros((4, 6), np.uint8))),
    ("rollout_routed_experts.dtype", set_array("rollout_routed_experts", np.zeros((4, 3, 2), np.int32))),
    ("status", edit("sample.status = 42")),
    ("status", edit("sample.status = 0")),
    ("metadata_json", edit("sample.metadata_json = '{'")),
    ("metadata_json", edit("sample.metadata_json = '[1]'")),
    ("metadata_json", edit("sample.metadata_json = 'null'")),
    ("metadata_json", edit("sample.metadata_json = '{\"a\": NaN}'")),
    ("metadata_json", edit("sample.metadata_json = '{\"a\": 1e999}'")),
    ("metadata_json", edit("sample.metadata_json = '{\"a\": ' + '9' * 5000 + '}'")),
    ("metadata_json", edit('sample.metadata_json = r\'{"a": "\\ud800"}\'')),
    ("metadata_json", edit("sample.metadata_json = '{\"a\": ' + '[' * 100000")),
    ("prompt", edit("sample.ClearField('prompt_messages_json')")),
    ("prompt_messages_json", edit("sample.prompt_messages_json = '{}'")),
    ("prompt_messages_json", edit("sample.prompt_messages_json = '[1]'")),
    ("prompt_messages_json", edit("sample.prompt_messages_json = ''")),
    ("reward", edit("sample.reward.value = nan")),
    ("reward", edit("sample.reward.value = inf")),
    ("reward", edit("sample.reward.Clear()\nsample.reward.SetInParent()")),
    ("reward", edit("sample.reward.named.SetInParent()")),
    ("reward['a']", edit("sample.reward.named.values['a'] = nan")),
    ("weight_versions", edit("del sample.weight_versions[:]")),
    ("weight_versions", edit("del sample.weight_versions[1]")),
    ("weight_versions[0].start", edit("del sample.weight_versions[0]")),
    ("weight_versions[1].start", edit("sample.weight_versions[1].start = 0")),
    ("weight_versions[1].end", edit("sample.weight_versions[1].end = 1")),
    ("weight_versions[1].end", edit("sample.weight_versions[1].end = 0")),
    ("weight_versions", edit("sample.weight_versions[1].end = 3")),
    ("speculative.accepted_draft_tokens", edit("sample.speculative.accepted_draft_tokens = 3")),
    ("prefix_cache.cached_tokens", edit("sample.prefix_cache.cached_tokens = 4")),
    ("group_id", edit("sample.group_id = 8")),
    ("index", edit("sample.index = 1")),
]


@pytest.mark.parametrize(("field", "spoil"), WIRE_FAULTS)
def test_a_malformed_message_is_refused_by_its_field(field: str, spoil: Callable[[pb.Sample], None]) -> None:
    message = group_to_proto(whole_group())
    spoil(message.samples[2])
    with pytest.raises(MalformedMessage) as caught:
        group_from_proto(pb.SampleGroup.FromString(message.SerializeToString()))
    assert caught.value.field == f"samples[2].{field}"
    assert str(caught.value) == f"samples[2].{field}: {caught.value.problem}"


OBJECT_FAULTS = [
    ("tokens", {"tokens": np.arange(5)}),
    ("tokens", {"tokens": np.arange(5, dtype=">i4")}),
    ("tokens", {"tokens": [1, 2, 3, 4, 5]}),
    ("tokens", {"tokens": np.zeros((5, 1), np.int32)}),
    ("response_length", {"response_length": -1}),
    ("response_length", {"response_length": 2.0}),
    ("response_length", {"response_length": True}),
    ("loss_mask", {"loss_mask": np.ones(2, bool)}),
    ("loss_mask", {"loss_mask": [1, 1]}),
    ("rollout_log_probs", {"rollout_log_probs": np.zeros(2)}),
    ("rollout_routed_experts", {"rollout_routed_experts": np.zeros((4, 3, 2), np.int32)}),
    ("status", {"status": "completed"}),
    ("metadata", {"metadata": [1]}),
    ("metadata", {"metadata": {"a": np.float32(1)}}),
    ("metadata", {"metadata": {"a": float("nan")}}),
    ("metadata", {"metadata": {"a": {1: 2}}}),
    ("metadata", {"metadata": {"a": (1, 2)}}),
    ("metadata", {"metadata": {"a": "\ud800"}}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": "\ud800"}),
    ("prompt[0]", {"prompt": ["hello"]}),
    ("prompt", {"prompt": [{"role": {1, 2}}]}),
    ("response", {"response": None}),
    ("response", {"response": "\udfff"}),
    ("label", {"label": 42}),
    ("reward", {"reward": "1"}),
    ("reward", {"reward": float("nan")}),
    ("reward", {"reward": 10**400}),
    ("reward", {"reward": {}}),
    ("reward", {"reward": {1: 1.0}}),
    ("reward['a']", {"reward": {"a": None}}),
    ("weight_versions[0].version", {"weight_versions": (VersionSpan(-1, 0, 2),)}),
    ("weight_versions[0].end", {"weight_versions": (VersionSpan(0, 0, 0),)}),
    ("speculative.verify_count", {"speculative": SpeculativeStats(0, 0, -1)}),
    ("prefix_cache.prompt_tokens", {"prefix_cache": PrefixCacheStats(0, 2**64)}),
    ("group_id", {"group_id": -1}),
    ("group_id", {"group_id": 2**64}),
    ("index", {"index": 2**32}),
]


@pytest.mark.parametrize(("field", "changes"), OBJECT_FAULTS)
def test_a_malformed_sample_is_not_sent(field: str, changes: dict[str, Any]) -> None:
    group = whole_group()
    for name, value in changes.items():
        setattr(group.samples[0], name, value)
    with pytest.raises(MalformedMessage) as caught:
        group_to_proto(group)
    assert caught.value.field == f"samples[0].{field}"


def test_a_nested_group_is_named_by_its_whole_path() -> None:
    message = group_to_proto(whole_group())
    message.samples[1].status = 0
    with pytest.raises(MalformedMessage, match=r"^lease\.group\.samples\[1\]\.status: unknown value 0$"):
        group_from_proto(message, "lease.group.")


def test_an_empty_array_with_impossible_dimensions_is_refused() -> None:
    group = whole_group()
    message = group_to_proto(SampleGroup("job", 7, [group.samples[0]]))
    sample = message.samples[0]
    sample.tokens.CopyFrom(array_to_proto(np.array([1], np.int32)))
    sample.rollout_routed_experts.data = b""
    sample.rollout_routed_experts.shape[:] = [0, 2**63, 2**63]
    with pytest.raises(MalformedMessage, match=r"samples\[0\]\.rollout_routed_experts\.shape: .* too large"):
        group_from_proto(message)


def usual_sample(index: int, **changes: Any) -> Sample:
    """A sample of the form that most have, which is checked together with others."""
    teachers = {"teacher_log_probs": None, "teacher_tokens": None, "teacher_token_log_probs": None}
    drafts = SpeculativeStats(1, 2, 1) if index % 2 else None
    rare = {**teachers, "speculative": drafts, "reward": 1.0}
    sample = dataclasses.replace(whole_sample(index), prompt="p", response="né", label="l", **rare)
    assert is_usual(sample)
    return dataclasses.replace(sample, **changes)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("tokens", {"tokens": np.array([1, 2, 3, -4, 5], np.int32)}),
        ("rollout_log_probs", {"rollout_log_probs": np.array([0.0, np.nan], np.float32)}),
        ("loss_mask", {"loss_mask": np.array([1, 2], np.uint8)}),
        ("response_length", {"response_length": 9}),
        ("response", {"response": "\ud800"}),
        ("rollout_routed_experts", {"rollout_routed_experts": np.zeros((5, 2, 2), np.uint8)}),
        ("rollout_routed_experts", {"rollout_routed_experts": np.zeros((4, 2), np.uint8)}),
        ("rollout_routed_experts", {"rollout_routed_experts": np.zeros((4, 2, 2), np.int32)}),
        ("rollout_routed_experts", {"rollout_routed_experts": [[[0]]] * 4}),
        ("speculative.accepted_draft_tokens", {"speculative": SpeculativeStats(3, 2, 1)}),
        ("speculative.proposed_draft_tokens", {"speculative": SpeculativeStats(0, 2**64, 1)}),
        ("speculative.verify_count", {"speculative": SpeculativeStats(1, 2, 1.0)}),  # type: ignore[arg-type]
    ],
)
def test_one_malformed_sample_of_several_is_named_by_its_field(field: str, changes: dict[str, Any]) -> None:
    samples = [usual_sample(0), usual_sample(1, **changes), usual_sample(2)]
    with pytest.raises(MalformedMessage) as refused:
        encode_samples(samples, pb.SampleGroup().samples)
    assert refused.value.field == field


def test_samples_that_are_encoded_together_are_those_that_are_encoded_one_by_one() -> None:
    group = pb.SampleGroup()
    samples = [usual_sample(0), whole_sample(1), usual_sample(2)]
    encode_samples(samples, group.samples)
    assert list(group.samples) == [sample_to_proto(sample) for sample in samples]
