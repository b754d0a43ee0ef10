"""A rollout's samples from rank 0, which reads the queue, to the ranks that train on them.

Every rank gets the schedule and all samples without their routed experts, about 13 bytes a token: rewards are compared
and counted over the whole rollout. Routed experts are some hundred bytes a token, so each rank gets those of its own
replica's samples alone, straight into the arrays that they stay in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from miles.services.trainer.backends.protocol import TrainerBackend
from miles.services.trainer.batch.rollout_batch import in_order
from miles.services.trainer.batch.rollout_schedule import RolloutSchedule
from miles.services.trainer.ranks.buffers import as_tensor, broadcast_bytes
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleGroup
from miles.types.wire import group_from_bytes, group_to_bytes


class SampleExchange:
    """Hands out the samples of a training step; every rank makes the same calls."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` holds all ranks, over gloo."""
        self._group = group
        self._rank, self._count = dist.get_rank(), dist.get_world_size()

    @traced("hand out samples")
    def hand_out(
        self, groups: Sequence[SampleGroup] | None, backend: TrainerBackend
    ) -> tuple[Sequence[SampleGroup], RolloutSchedule]:
        """Rank 0's groups and its schedule of them; rank 0 passes the groups, the others None.

        Afterwards a sample has its routed experts where its replica trains on it; rank 0 drops those that it has sent
        and does not need. Raises on every rank when the groups cannot be scheduled or written: rank 0 its own error,
        the others RuntimeError.
        """
        replicas = self._replicas(backend.replica)
        if groups is not None:
            schedule = self._announce(groups, backend)
            self._send(in_order(groups), schedule, replicas)
            return groups, schedule
        header = json.loads(broadcast_bytes(b"", self._group))
        if "error" in header:
            raise RuntimeError(f"rank 0 could not hand out samples: {header['error']}")
        schedule = RolloutSchedule.from_json(header["schedule"])
        received = [group_from_bytes(broadcast_bytes(b"", self._group)) for _ in range(header["groups"])]
        self._receive(in_order(received), schedule.share(backend.replica), header["experts"])
        return received, schedule

    def _replicas(self, mine: int) -> list[int]:
        """Each rank's replica."""
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self._count)]
        dist.all_gather(found, torch.tensor([mine]), group=self._group)
        return [int(replica) for replica in found]

    def _announce(self, groups: Sequence[SampleGroup], backend: TrainerBackend) -> RolloutSchedule:
        """Rank 0: broadcast all but the routed experts."""
        try:
            schedule = backend.schedule(groups)
            payloads = [_without_experts(group) for group in groups]
            header = {
                "schedule": schedule.to_json(),
                "groups": len(payloads),
                "experts": [_form(sample) for sample in in_order(groups)],
            }
        except Exception as error:
            broadcast_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), self._group)
            raise
        broadcast_bytes(json.dumps(header).encode(), self._group)
        for payload in payloads:
            broadcast_bytes(payload, self._group)
        return schedule

    def _send(self, samples: Sequence[Sample], schedule: RolloutSchedule, replicas: Sequence[int]) -> None:
        """Rank 0: send each rank the routed experts of its samples."""
        for rank in range(1, self._count):
            for i in schedule.share(replicas[rank]):
                experts = samples[i].rollout_routed_experts
                if experts is not None:
                    dist.send(as_tensor(np.ascontiguousarray(experts)), dst=rank, group=self._group)
        sent = {i for replica in set(replicas) for i in schedule.share(replica)} - set(schedule.share(replicas[0]))
        for i in sent:
            samples[i].rollout_routed_experts = None

    def _receive(self, samples: Sequence[Sample], mine: Sequence[int], forms: Sequence[Any]) -> None:
        for i in mine:
            if forms[i] is not None:
                dtype, *sizes = forms[i]
                experts: npt.NDArray[np.integer[Any]] = np.empty((len(samples[i].tokens) - 1, *sizes), dtype)
                dist.recv(as_tensor(experts), src=0, group=self._group)
                samples[i].rollout_routed_experts = experts


def _form(sample: Sample) -> list[Any] | None:
    """Type, layers and experts a token, as JSON."""
    experts = sample.rollout_routed_experts
    return None if experts is None else [experts.dtype.str, *experts.shape[1:]]


def _without_experts(group: SampleGroup) -> bytes:
    samples = [dataclasses.replace(sample, rollout_routed_experts=None) for sample in group.samples]
    return group_to_bytes(SampleGroup(group.job_id, group.group_id, samples))
