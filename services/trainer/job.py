"""The job that the trainer holds, and what the trainer does with it: train a step, publish a version, save, discard."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.config import JobConfig
from miles.drafts import recordings
from miles.queue import GroupQueue, connect_async
from miles.rpc import connect_blocking
from miles.rpc.gen import trainer_pb2, weightsource_pb2, weightsync_pb2_grpc
from miles.services.trainer.batch.rollout_functions import RolloutFunctions
from miles.services.trainer.checkpoint.manager import CheckpointManager
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.abandoning import Abandonment
from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.leader import Leader
from miles.services.trainer.ranks.shared_folders import check_shared_folders
from miles.services.trainer.step.progress import Progress, Report
from miles.telemetry.rollout_metrics import rollout_metrics
from miles.telemetry.tracing import traced
from miles.types import SampleGroup

if TYPE_CHECKING:
    import grpc
    import redis.asyncio

    from miles.services.trainer.ranks.worker import RankWorker
    from miles.weights import PublishResult, WeightPublisher
    from miles.weights.publisher import Layout

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class StepRequest:
    """One training step to take."""

    step: int
    group_ids: Sequence[int]
    """Groups to train on."""
    dropped_group_ids: Sequence[int]
    """Groups dropped since the last step, for the next checkpoint to account for."""
    deadline_s: float
    """How long to wait for the groups to appear in the queue."""


class Job:
    """One job on all ranks. Calls other than `abandon` come one at a time."""

    def __init__(
        self,
        leader: Leader,
        job_id: str,
        config: JobConfig,
        run_dir: pathlib.Path,
        client: redis.asyncio.Redis,
        weightsync_address: str,
        state: TrainerState,
    ) -> None:
        """Hold a job that all ranks have loaded; `client` is closed with it."""
        self.job_id = job_id
        self.state = state
        self.loaded_from = leader.worker.loaded_from
        """Checkpoint that the job was loaded from; None for the initial weights."""
        self.loaded_step = state.step
        """Steps that it had then."""
        self.notes = list(leader.worker.notes)
        """What a person should know of how it was loaded."""
        self.is_discarded = False
        self._leader = leader
        self._config = config
        self._run_dir = run_dir
        self._redis = client
        self._queue = GroupQueue(client, job_id)
        self._functions = RolloutFunctions(config)
        self._weightsync: grpc.Channel = connect_blocking(weightsync_address)
        self._weightsync_address = weightsync_address
        self._publisher: WeightPublisher | None = None
        """Kept from one version to the next: it holds mappings that are costly to make."""
        folder, found = checkpoint_dir(config, run_dir), self.loaded_from
        saved_step = state.step if found is not None and found == folder / found.name else None
        self._checkpoints = CheckpointManager(
            leader, self._queue, folder, saved_step, config.checkpoint.save_retain_interval
        )
        self._abandonment: Abandonment | None = None
        """Of the training step that is running."""
        self._step_to_abandon: int | None = None
        """A step to abandon as soon as it is requested."""

    @classmethod
    async def start(
        cls,
        leader: Leader,
        job_id: str,
        config: JobConfig,
        run_dir: pathlib.Path,
        redis_url: str,
        weightsync_address: str,
        data: Mapping[str, Any],
    ) -> Job:
        """Load the job on every rank, from its newest checkpoint or the initial weights.

        `data` is the identity of its prompts; empty when there are none. Raises FileNotFoundError for a folder that one
        of the ranks' hosts does not have.
        """
        folder = checkpoint_dir(config, run_dir)
        await check_shared_folders(leader, config, folder, recordings.root_of(config, run_dir))
        arguments = {"config": config.to_flat(), "checkpoint_dir": str(folder)}
        state: TrainerState = await leader.run(Command("start", arguments))
        client = await connect_async(redis_url)
        job = cls(leader, job_id, config, run_dir, client, weightsync_address, state)
        await job._take_data(data)
        if job.loaded_from is not None:  # a crash between a checkpoint and its acknowledgement leaves entries behind
            await job._acknowledge_consumed()
        return job

    @property
    def warnings(self) -> Sequence[str]:
        """What a person should know of the last training step."""
        return self._leader.worker.warnings

    @property
    def newest_checkpoint(self) -> pathlib.Path | None:
        """The newest complete checkpoint."""
        return self._checkpoints.newest

    @traced("train")
    async def train(self, request: StepRequest, report: Report) -> bool:
        """Wait for the groups and train on them; return False for a step that was abandoned.

        An error in the step discards the job: some parameters may have moved and others not.
        """
        self._checkpoints.raise_failure()
        abandon_now, self._step_to_abandon = self._step_to_abandon == request.step, None
        if abandon_now:
            return False
        abandonment = self._abandonment = self._leader.worker.abandonment()
        try:
            return await self._take_step(request, report, abandonment)
        finally:
            self._abandonment = None

    def abandon(self, step: int) -> bool:
        """Abandon a training step that is running, or as soon as it is requested; False when it is too late."""
        if step != self.state.step:
            return False
        if self._abandonment is not None:
            return self._abandonment.request()
        self._step_to_abandon = step
        return True

    def forget_abandoned(self) -> None:
        """Take the next step even if it was to be abandoned."""
        self._step_to_abandon = None

    @traced("publish")
    async def publish(self, version: int) -> PublishResult:
        """Export the weights as a version and hand it to the weight-sync service."""
        from miles.services.trainer.export import export_command, merge

        publisher = self._publisher = self._publisher or self._new_publisher()
        layout = await self._look_for_engines(publisher)
        pending = await self._leader.alone(lambda worker: publisher.begin(version, version, layout, worker.lora))
        with publisher.discarding_on_failure(pending):
            command = export_command(pending, self._weightsync_address, self._config.weights.update_weight_buffer_size)
            reports = await self._leader.gather(command, sender=publisher.sender)
            times = merge(pending, reports)
            return await self._leader.alone(lambda _: publisher.finish(pending, times))

    async def save(self, *, in_background: bool, export_hf: bool) -> pathlib.Path | None:
        """Write a checkpoint; return the Hugging Face folder when one was written too."""
        step = self.state.step
        await self._checkpoints.save(self.state, in_background=in_background)
        template = self._config.checkpoint.save_hf
        if template is None and not export_hf:
            return None
        hf_dir = pathlib.Path(template.format(rollout_id=step)) if template else self._run_dir / "hf" / str(step)
        await self._leader.run(Command("save_hf", {"directory": str(hf_dir)}))
        return hf_dir

    async def release_memory(self, *, state: bool) -> trainer_pb2.TrainerReleaseMemoryResponse:
        """Have every rank free what its device keeps for the next step; with `state`, all until a call needs it."""
        reports = await self._leader.gather(Command("release_memory", {"state": state}))
        parts = [trainer_pb2.TrainerReleaseMemoryResponse.FromString(report) for report in reports]
        return trainer_pb2.TrainerReleaseMemoryResponse(
            released_bytes=sum(part.released_bytes for part in parts), release_s=max(part.release_s for part in parts)
        )

    async def discard(self) -> None:
        """Finish the checkpoint that is being written, then free everything held for the job on every rank."""
        self.is_discarded = True
        try:
            await self.close()
        finally:
            await self._leader.run(Command("stop"))

    async def close(self) -> None:
        """Finish the checkpoint that is being written and close all connections; the ranks keep the model."""
        try:
            await self._checkpoints.flush()
        finally:
            if self._publisher is not None:
                self._publisher.close()
            self._publisher = None
            self._weightsync.close()
            await self._redis.aclose()

    async def _take_step(self, request: StepRequest, report: Report, abandonment: Abandonment) -> bool:
        report(Progress("waiting", 0, len(request.group_ids)))
        collected = await self._queue.collect(request.group_ids, request.deadline_s)
        groups: list[SampleGroup] = [group for _, group in collected.values()]
        await self._functions.apply(groups)
        command = Command("train", {"step": request.step})
        try:
            metrics = await self._leader.run(command, groups=groups, report=report, abandonment=abandonment)
        except Exception:
            await self.discard()
            raise
        if metrics is None:
            logger.info("step %d was abandoned; nothing has changed", request.step)
            return False
        consumed = [*request.group_ids, *request.dropped_group_ids]
        self.state.consume(consumed)
        self._checkpoints.consumed(consumed)
        key, passrate = self._config.reward.reward_key, self._config.telemetry.log_passrate
        self.state.finish_step({**metrics, **rollout_metrics(groups, key, with_pass_rates=passrate)})
        return True

    async def _take_data(self, data: Mapping[str, Any]) -> None:
        """Go on with these prompts; groups of former ones that are left in the queue are not trained on."""
        known = [*(entry.group_id for entry in await self._queue.outstanding()), *await self._queue.dropped()]
        began = self.state.data_begins_at
        if words := self.state.take_data(data, max((group_id + 1 for group_id in known), default=0)):
            logger.warning("%s", words)
            self.notes.append(words)
        if self.state.data_begins_at != began:
            await self._queue.forget_partials()

    async def _acknowledge_consumed(self) -> None:
        """Acknowledge queue entries of groups that the loaded checkpoint covers."""
        entries = await self._queue.outstanding()
        await self._queue.acknowledge([e.group_id for e in entries if self.state.is_consumed(e.group_id)])

    async def _look_for_engines(self, publisher: WeightPublisher) -> Layout:
        """Have all ranks find out whether they can share GPU memory with engines that have come since last time.

        Returns the layout of what will be published.
        """

        def look(worker: RankWorker) -> tuple[Layout, Sequence[weightsource_pb2.GpuMemoryProbe]]:
            layout = worker.layout()
            return layout, publisher.untried_engines(layout)

        layout, untried = await self._leader.alone(look)
        if untried:
            command = Command("open_gpu_memory", payloads=tuple(probe.SerializeToString() for probe in untried))
            reports = await self._leader.gather(command)
            publisher.opened(untried, [weightsource_pb2.OpenedGpuMemory.FromString(report) for report in reports])
        return layout

    def _new_publisher(self) -> WeightPublisher:
        from miles.weights import WeightPublisher
        from miles.weights.publisher import DeltaSettings
        from miles.weights.transports.names import ENCODING_OF_NAME, TRANSPORT_OF_MODE

        weights = self._config.weights
        return WeightPublisher(
            weightsync_pb2_grpc.WeightSyncServiceStub(self._weightsync),
            self.job_id,
            endpoint=self._leader.worker.endpoint(self._weightsync_address),
            bucket_bytes=weights.update_weight_buffer_size,
            transport=TRANSPORT_OF_MODE[weights.update_weight_transfer_mode],
            delta=DeltaSettings(
                ENCODING_OF_NAME[weights.update_weight_delta_encoding], weights.update_weight_full_interval
            ),
        )


def checkpoint_dir(config: JobConfig, run_dir: pathlib.Path) -> pathlib.Path:
    """Folder of a job's checkpoints."""
    return pathlib.Path(config.checkpoint.save) if config.checkpoint.save else run_dir / "checkpoints"
