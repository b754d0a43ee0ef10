"""Stands in for rollouts in a run without engines: its groups are read from files and put into the sample queue.

Admission, the queue, the trainer and a resume see no difference to groups that were generated.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from miles.data import DataError
from miles.queue.backpressure import TRANSIENT
from miles.rollout_dumps.files import read_rollout, subsample
from miles.rollout_dumps.names import rollout_path
from miles.rpc.gen import rollout_pb2
from miles.services.controller.clients.calls import WorkerFailedError
from miles.services.controller.clients.protocols import RolloutListener
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.queue import GroupQueue

NAME = "recorded"
"""What stands in its place where a worker is named."""


class RecordedGroups:
    """The groups of dumped rollouts in the order of training. Reads a file once for all of its groups."""

    def __init__(self, job_id: str, config: JobConfig) -> None:
        assert config.debug.load_debug_rollout_data is not None, "a rule requires it"
        self._job_id = job_id
        self._template = config.debug.load_debug_rollout_data
        self._share = config.debug.load_debug_rollout_data_subsample
        self._batch = config.data.rollout_batch_size
        self._samples = config.data.n_samples_per_prompt
        self._files: dict[int, list[SampleGroup]] = {}
        self._first_id = self._first_place = 0
        self._consumed: frozenset[int] = frozenset()

    def begin_at(self, step: int, consumed_below: int, consumed_ids: Collection[int]) -> None:
        """The next groups that are not consumed are those of this step, whatever was dropped before it."""
        self._first_id, self._first_place = consumed_below, step * self._batch
        self._consumed = frozenset(consumed_ids)

    def group(self, group_id: int) -> SampleGroup:
        """Return a group under this id. Raises DataError, and OSError for a file that cannot be read."""
        before = sum(consumed < group_id for consumed in self._consumed)
        rollout_id, index = divmod(self._first_place + group_id - self._first_id - before, self._batch)
        recorded = self._rollout(rollout_id)[index]
        for sample in recorded.samples:
            sample.group_id = group_id
        return SampleGroup(self._job_id, group_id, recorded.samples)

    def _rollout(self, rollout_id: int) -> list[SampleGroup]:
        if rollout_id not in self._files:
            if len(self._files) > 1:
                del self._files[next(iter(self._files))]
            self._files[rollout_id] = self._read(rollout_id)
        return self._files[rollout_id]

    def _read(self, rollout_id: int) -> list[SampleGroup]:
        path = rollout_path(self._template, rollout_id)
        try:
            groups = read_rollout(path, self._samples, rollout_id)
        except ValueError as error:
            raise DataError(str(error)) from error
        found = f"{path} has {len(groups)} groups"
        if self._share is not None:
            groups = subsample(groups, self._share)
            found += f", of which load_debug_rollout_data_subsample = {self._share:g} leaves {len(groups)}"
        if len(groups) != self._batch:
            raise DataError(f"{found}, but rollout_batch_size = {self._batch}; set it to {len(groups)}")
        self._check_sizes(path, groups)
        return groups

    def _check_sizes(self, path: pathlib.Path, groups: Sequence[SampleGroup]) -> None:
        for number, group in enumerate(groups):
            if len(group.samples) != self._samples:
                raise DataError(
                    f"group {number} of {path} has {len(group.samples)} samples, but n_samples_per_prompt = "
                    f"{self._samples}; set it to that of the run that wrote it"
                )


class RecordedRollout:
    """The one rollout of such a run: what is leased to it is read."""

    def __init__(self, capacity: int) -> None:
        self.worker_id = NAME
        self.capacity = capacity
        self.connected = False
        self.out_of_routing = ""
        self.refused_weights = False
        self.stage = ""
        self.loading_since_s: float | None = None
        self.progress = rollout_pb2.RunProgress()
        self.reward_addresses: Mapping[str, str] = {}
        self.leases: asyncio.Queue[rollout_pb2.GroupLease] = asyncio.Queue()

    def lease(self, lease: rollout_pb2.GroupLease) -> None:
        self.leases.put_nowait(lease)

    def preempt(self, group_id: int, attempt: int, purpose: rollout_pb2.GroupPurpose.ValueType) -> None:
        """A group is read to its end, which is soon."""

    async def release_memory(self) -> rollout_pb2.ReleaseMemoryResponse:
        """It holds nothing."""
        return rollout_pb2.ReleaseMemoryResponse()


class RecordedRollouts:
    """See `RolloutWorkers`, in whose place it stands."""

    def __init__(self, groups: RecordedGroups, queue: GroupQueue, batch_size: int) -> None:
        self.may_load = asyncio.Event()
        self.generated_tokens = 0
        self._groups = groups
        self._queue = queue
        self._rollout = RecordedRollout(capacity=2 * batch_size)

    def all(self) -> Sequence[RecordedRollout]:
        return [self._rollout]

    def connected(self) -> Sequence[RecordedRollout]:
        return [self._rollout] if self._rollout.connected else []

    def get(self, worker_id: str) -> RecordedRollout | None:
        return self._rollout if worker_id == NAME else None

    def check(self) -> None:
        """There are no weights that it could refuse."""

    async def run(self, listener: RolloutListener) -> None:
        """Read what is leased until cancelled. Raises DataError and OSError for a file that cannot be trained on."""
        rollout = self._rollout
        rollout.connected = True
        ready = rollout_pb2.RunReady(capacity_groups=rollout.capacity)
        listener.on_response(rollout, rollout_pb2.RunResponse(ready=ready))
        while True:
            lease = await rollout.leases.get()
            group = await asyncio.to_thread(self._groups.group, lease.group_id)
            oldest = group.oldest_version or 0
            try:
                entry = await self._queue.put(group, attempt=lease.attempt, oldest_version=oldest)
            except TRANSIENT as error:
                raise WorkerFailedError(f"group {lease.group_id} could not be queued: {error}") from error
            finished = rollout_pb2.GroupFinished(
                group_id=lease.group_id,
                attempt=lease.attempt,
                purpose=lease.purpose,
                verdict=rollout_pb2.FILTER_VERDICT_KEEP,
                entry_id=entry,
                oldest_version=oldest,
            )
            listener.on_response(rollout, rollout_pb2.RunResponse(finished=finished))
