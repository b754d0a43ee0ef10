from __future__ import annotations

from collections.abc import Callable

import pytest

from miles.rpc.gen import rollout_pb2
from miles.services.rollout.groups.messages import (
    Failed,
    Finished,
    Preempted,
    Purpose,
    lease_from_proto,
    outcome_to_proto,
    sampling_from_proto,
)
from miles.types import MalformedMessage, SampleGroup
from miles.types.convert import group_from_proto, group_to_proto

MakeGroup = Callable[..., SampleGroup]


def sampling(**changes: object) -> rollout_pb2.SamplingParams:
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 8, "seed": 2**64 - 1}
    return rollout_pb2.SamplingParams(**{**fields, **changes})  # type: ignore[arg-type]


def message(group: SampleGroup, **changes: object) -> rollout_pb2.GroupLease:
    fields = {
        "group_id": group.group_id,
        "attempt": 2,
        "purpose": rollout_pb2.GROUP_PURPOSE_TRAIN,
        "group": group_to_proto(group),
        "sampling": [sampling(stop=["x"], skip_special_tokens=i == 0) for i in range(len(group.samples))],
    }
    return rollout_pb2.GroupLease(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_lease_is_read(make_group: MakeGroup) -> None:
    group = make_group(3)
    lease = lease_from_proto(message(group, min_version=0))
    assert (lease.group_id, lease.attempt, lease.purpose, lease.group) == (3, 2, Purpose.TRAIN, group)
    assert (lease.min_version, lease.exact_version) == (0, None)
    assert lease.skip_special_tokens == (True, False)
    assert lease.sampling[0].seed == 2**64 - 1
    assert lease.sampling[0].stop == ("x",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", -2),
        ("max_new_tokens", 0),
        ("min_new_tokens", 9),
        ("stop", [""]),
    ],
)
def test_bad_sampling_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(MalformedMessage, match=rf"^sampling\.{field}: "):
        sampling_from_proto(sampling(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("top_p", 0.9), ("top_k", 5)])
def test_training_takes_no_tokens_drawn_from_another_distribution_than_they_are_scored_under(
    make_group: MakeGroup, field: str, value: float
) -> None:
    lease = message(make_group(3), sampling=[sampling(), sampling(**{field: value})])
    with pytest.raises(MalformedMessage, match=rf"^sampling\[1\]\.{field}: .*allowed in training"):
        lease_from_proto(lease)
    lease.purpose = rollout_pb2.GROUP_PURPOSE_EVAL
    assert getattr(lease_from_proto(lease).sampling[1], field) == pytest.approx(value)


def test_malformed_leases_are_refused_by_field(make_group: MakeGroup) -> None:
    group = make_group(3)
    for field, bad in {
        "purpose": message(group, purpose=rollout_pb2.GROUP_PURPOSE_UNSPECIFIED),
        "group.group_id": message(group, group_id=4),
        "sampling": message(group, sampling=[sampling()]),
        r"sampling\[1\].top_p": message(group, sampling=[sampling(), sampling(top_p=2)]),
        "group.samples": message(make_group(3, samples=0)),
        "group.samples: 2 entries beside seeds": message(group, seeds=[1, 2]),
    }.items():
        with pytest.raises(MalformedMessage, match=f"^{field}"):
            lease_from_proto(bad)


def test_outcomes_are_reported_with_their_lease(make_group: MakeGroup) -> None:
    group = make_group(5)
    stats = rollout_pb2.GroupStats(samples=2)
    kept = outcome_to_proto(5, 2, Purpose.TRAIN, Finished(stats, 7, entry_id="1-0"), 9)
    assert (kept.lease_number, kept.finished.group_id, kept.finished.attempt) == (9, 5, 2)
    assert (kept.finished.verdict, kept.finished.entry_id) == (rollout_pb2.FILTER_VERDICT_KEEP, "1-0")
    assert kept.finished.oldest_version == 7
    assert not kept.finished.HasField("group")
    dropped = outcome_to_proto(5, 2, Purpose.TRAIN, Finished(stats, keep=False, reason="why"), 9).finished
    assert (dropped.verdict, dropped.reason) == (rollout_pb2.FILTER_VERDICT_DROP, "why")
    evaluated = outcome_to_proto(5, 2, Purpose.EVAL, Finished(stats, group=group), 9).finished
    assert group_from_proto(evaluated.group) == group
    assert evaluated.purpose == rollout_pb2.GROUP_PURPOSE_EVAL
    failed = outcome_to_proto(5, 2, Purpose.EVAL, Failed("e", retryable=False), 9).failed
    assert (failed.error, failed.retryable, failed.purpose) == ("e", False, rollout_pb2.GROUP_PURPOSE_EVAL)
    preempted = outcome_to_proto(5, 2, Purpose.TRAIN, Preempted(11), 9).preempted
    assert (preempted.saved_tokens, preempted.purpose) == (11, rollout_pb2.GROUP_PURPOSE_TRAIN)
