"""What a run asks of its trainer and of its rollouts, whether they are workers or stand in for those it has not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from miles.rpc.gen import rollout_pb2, trainer_pb2


class Trainer(Protocol):
    """Takes a run's training steps; `clients.trainer.TrainerClient` says what its calls do and raise."""

    stage: str
    loading_since_s: float | None

    @property
    def worker_id(self) -> str: ...

    @property
    def lost(self) -> bool: ...

    async def aclose(self) -> None: ...

    async def start_job(self) -> trainer_pb2.TrainerReady: ...

    async def train(
        self, step: int, group_ids: Sequence[int] = (), dropped: Sequence[int] = ()
    ) -> trainer_pb2.TrainDone: ...

    async def abandon(self, step: int) -> bool: ...

    async def export(self, version: int) -> trainer_pb2.ExportResponse: ...

    async def release_memory(self, *, state: bool) -> trainer_pb2.TrainerReleaseMemoryResponse: ...

    async def save(self, export_hf: bool, in_background: bool) -> trainer_pb2.SaveCheckpointResponse: ...


class Rollout(Protocol):
    """Delivers groups; `clients.rollout.RolloutClient` says what its attributes are."""

    worker_id: str
    capacity: int
    connected: bool
    out_of_routing: str
    refused_weights: bool
    stage: str
    loading_since_s: float | None
    progress: rollout_pb2.RunProgress

    @property
    def reward_addresses(self) -> Mapping[str, str]: ...

    def lease(self, lease: rollout_pb2.GroupLease) -> None: ...

    def preempt(self, group_id: int, attempt: int, purpose: rollout_pb2.GroupPurpose.ValueType) -> None: ...

    async def release_memory(self) -> rollout_pb2.ReleaseMemoryResponse: ...


class RolloutListener(Protocol):
    """What happens on the connections."""

    def on_response(self, client: Rollout, response: rollout_pb2.RunResponse) -> None:
        """A rollout sent something."""

    def on_disconnected(self, client: Rollout) -> None:
        """A rollout cannot take groups."""

    def on_lost(self, client: Rollout) -> None:
        """A rollout can queue nothing more: others may get its groups."""


class Rollouts(Protocol):
    """All that deliver a run's groups; `run.rollout_workers.RolloutWorkers` says what its calls do."""

    may_load: asyncio.Event

    @property
    def generated_tokens(self) -> int: ...

    def all(self) -> Sequence[Rollout]: ...

    def connected(self) -> Sequence[Rollout]: ...

    def get(self, worker_id: str) -> Rollout | None: ...

    def check(self) -> None: ...

    async def run(self, listener: RolloutListener) -> None: ...
