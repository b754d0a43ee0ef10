"""Conversion of group leases and their outcomes between the wire and the types used here."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
from collections.abc import Sequence

from miles.rpc.gen import rollout_pb2
from miles.services.rollout.engines.base import SamplingParams
from miles.types import MalformedMessage, SampleGroup
from miles.types.convert import group_from_proto, group_to_proto


class Purpose(enum.Enum):
    """What a group is generated for."""

    TRAIN = "train"
    EVAL = "eval"

    @property
    def proto(self) -> rollout_pb2.GroupPurpose.ValueType:
        """The same purpose on the wire."""
        return rollout_pb2.GROUP_PURPOSE_TRAIN if self is Purpose.TRAIN else rollout_pb2.GROUP_PURPOSE_EVAL


_PURPOSES = {purpose.proto: purpose for purpose in Purpose}


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLease:
    """One prompt group to generate."""

    group_id: int
    attempt: int
    purpose: Purpose
    group: SampleGroup
    sampling: tuple[SamplingParams, ...]
    """One entry a sample."""
    skip_special_tokens: tuple[bool, ...]
    """One entry a sample: leave special tokens out of the decoded text."""
    min_version: int | None = None
    exact_version: int | None = None
    newest_version: int | None = None
    """Newest version there is; tokens of a later one come from weights that were rolled back."""

    @property
    def is_training(self) -> bool:
        """True when the group goes to the sample queue."""
        return self.purpose is Purpose.TRAIN


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The group was queued, was dropped (`reason`), or is returned with its scores (evaluation: `group`)."""

    stats: rollout_pb2.GroupStats
    oldest_version: int = 0
    entry_id: str = ""
    keep: bool = True
    reason: str = ""
    group: SampleGroup | None = None
    example: rollout_pb2.ScoredExample | None = None
    """One of its samples, when the group was dropped or its rewards are all equal."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The group could not be finished."""

    error: str
    retryable: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Preempted:
    """The run was ended early; `saved_tokens` response tokens of the group are stored for the next one."""

    saved_tokens: int


Outcome = Finished | Failed | Preempted


def sampling_from_proto(message: rollout_pb2.SamplingParams, path: str = "sampling") -> SamplingParams:
    """Decode and check sampling parameters. Raises MalformedMessage naming the field."""
    checks = (
        ("temperature", math.isfinite(message.temperature) and message.temperature >= 0, "finite and not negative"),
        ("top_p", 0 < message.top_p <= 1, "in (0, 1]"),
        ("top_k", message.top_k == -1 or message.top_k > 0, "-1 (all) or positive"),
        ("max_new_tokens", message.max_new_tokens > 0, "positive"),
        ("min_new_tokens", message.min_new_tokens <= message.max_new_tokens, "at most max_new_tokens"),
        ("stop", all(message.stop), "texts that are not empty"),
    )
    for name, valid, allowed in checks:
        if not valid:
            raise MalformedMessage(f"{path}.{name}", f"{getattr(message, name)}; allowed: {allowed}")
    return SamplingParams(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        min_new_tokens=message.min_new_tokens,
    )


def lease_from_proto(message: rollout_pb2.GroupLease) -> GroupLease:
    """Decode and check a group lease. Raises MalformedMessage naming the field."""
    purpose = _PURPOSES.get(message.purpose)
    if purpose is None:
        raise MalformedMessage("purpose", f"{message.purpose}; allowed: TRAIN and EVAL")
    group = group_from_proto(message.group, "group.")
    if group.group_id != message.group_id:
        raise MalformedMessage("group.group_id", f"{group.group_id}, but the lease is for group {message.group_id}")
    if not group.samples:
        raise MalformedMessage("group.samples", "empty; a group has at least one sample")
    if len(message.sampling) != len(group.samples):
        raise MalformedMessage("sampling", f"{len(message.sampling)} entries for {len(group.samples)} samples")
    for i, sample in enumerate(group.samples):
        if sample.prompt_length == 0:
            raise MalformedMessage(f"group.samples[{i}].tokens", "no prompt tokens")
    sampling = [sampling_from_proto(entry, f"sampling[{i}]") for i, entry in enumerate(message.sampling)]
    if purpose is Purpose.TRAIN:
        for i, entry in enumerate(message.sampling):
            _check_scored_as_drawn(entry, f"sampling[{i}]")
    skip_special_tokens = [entry.skip_special_tokens for entry in message.sampling]
    if seeds := message.seeds:
        if len(group.samples) != 1:
            raise MalformedMessage("group.samples", f"{len(group.samples)} entries beside seeds; allowed: 1")
        group, sampling = _copies(group, sampling[0], seeds)
        skip_special_tokens *= len(seeds)
    return GroupLease(
        group_id=message.group_id,
        attempt=message.attempt,
        purpose=purpose,
        group=group,
        sampling=tuple(sampling),
        skip_special_tokens=tuple(skip_special_tokens),
        min_version=message.min_version if message.HasField("min_version") else None,
        exact_version=message.exact_version if message.HasField("exact_version") else None,
        newest_version=message.newest_version if message.HasField("newest_version") else None,
    )


def _copies(
    group: SampleGroup, sampling: SamplingParams, seeds: Sequence[int]
) -> tuple[SampleGroup, list[SamplingParams]]:
    """Return a group with a sample for each seed, all like its only one but for the index; and their parameters."""
    first = group.samples[0]
    samples = [
        dataclasses.replace(first, index=i, prompt=copy.deepcopy(first.prompt), metadata=copy.deepcopy(first.metadata))
        for i in range(len(seeds))
    ]
    return SampleGroup(group.job_id, group.group_id, samples), [dataclasses.replace(sampling, seed=s) for s in seeds]


def _check_scored_as_drawn(message: rollout_pb2.SamplingParams, path: str) -> None:
    """Training scores tokens under the full distribution at the temperature, so they must be drawn from it."""
    checks = (
        ("temperature", message.temperature > 0, "above 0"),
        ("top_p", message.top_p == 1, "1"),
        ("top_k", message.top_k == -1, "-1"),
    )
    for name, valid, allowed in checks:
        if not valid:
            raise MalformedMessage(f"{path}.{name}", f"{getattr(message, name)}; allowed in training: {allowed}")


def outcome_to_proto(
    group_id: int, attempt: int, purpose: Purpose, outcome: Outcome, lease_number: int
) -> rollout_pb2.RunResponse:
    """Encode the outcome of a group lease; `lease_number` is that of the worker lease it was handed out under."""
    response = rollout_pb2.RunResponse(lease_number=lease_number)
    match outcome:
        case Finished():
            keep, drop = rollout_pb2.FILTER_VERDICT_KEEP, rollout_pb2.FILTER_VERDICT_DROP
            response.finished.CopyFrom(
                rollout_pb2.GroupFinished(
                    group_id=group_id,
                    attempt=attempt,
                    purpose=purpose.proto,
                    verdict=keep if outcome.keep else drop,
                    reason=outcome.reason,
                    entry_id=outcome.entry_id,
                    oldest_version=outcome.oldest_version,
                    stats=outcome.stats,
                    group=None if outcome.group is None else group_to_proto(outcome.group),
                    example=outcome.example,
                )
            )
        case Failed():
            response.failed.CopyFrom(
                rollout_pb2.GroupFailed(
                    group_id=group_id,
                    attempt=attempt,
                    purpose=purpose.proto,
                    error=outcome.error,
                    retryable=outcome.retryable,
                )
            )
        case Preempted():
            response.preempted.CopyFrom(
                rollout_pb2.GroupPreempted(
                    group_id=group_id, attempt=attempt, purpose=purpose.proto, saved_tokens=outcome.saved_tokens
                )
            )
    return response
