"""Builds the parts of a run and connects them, once the workers that they need are attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miles.change_signal import ChangeSignal
from miles.config.notes.staleness import staleness_warning
from miles.config.schema.flat_settings import FlatSettings
from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.services.controller.clients.protocols import Rollouts, Trainer
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs import number_types
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.checkpoints import Checkpoints
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.drafts import RunDrafts
from miles.services.controller.run.dropped_groups import DroppedGroups
from miles.services.controller.run.equal_rewards import EqualRewards
from miles.services.controller.run.evaluation_schedule import EvaluationSchedule
from miles.services.controller.run.gpu_turns import GpuTurns
from miles.services.controller.run.lease_messages import training_lease
from miles.services.controller.run.publication_schedule import PublicationSchedule
from miles.services.controller.run.publish import Publisher
from miles.services.controller.run.recorded_rollouts import RecordedGroups, RecordedRollouts
from miles.services.controller.run.report import RunReport
from miles.services.controller.run.rollout_dump import RolloutDump
from miles.services.controller.run.rollout_workers import RolloutWorkers
from miles.services.controller.run.state import LOADING, PREEMPTED, RunState
from miles.services.controller.run.step_traces import StepTraces
from miles.services.controller.speculation.acceptance import RunAcceptance
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import WorkerRegistry
from miles.services.controller.workers.required_workers import RequiredWorkers

if TYPE_CHECKING:
    from miles.data import PromptSource
    from miles.queue import GroupQueue


class RunSetup:
    """Sets up one run."""

    def __init__(
        self,
        context: JobContext,
        history: JobHistory,
        controls: JobControls,
        registry: WorkerRegistry,
        queue: GroupQueue,
        prompts: PromptSource | None,
        eval_sets: Mapping[str, PromptSource],
        activities: WorkerActivities,
        status: RunStatus,
    ) -> None:
        """`status` describes the run; it began before the data was read."""
        self._context = context
        self._history = history
        self._controls = controls
        self._registry = registry
        self._queue = queue
        self._prompts = prompts
        self._eval_sets = eval_sets
        self._clock = ActivityClock(on_span=history.timeline.add)
        self._activities = activities
        self._status = status
        self._workers = RequiredWorkers(registry, controls, status)
        self._changed = ChangeSignal()
        self._alerts = RunAlerts(self._changed)
        self._report = RunReport(history, self._clock, self._alerts)

    async def connect(self) -> RunState:
        """Wait for the workers that every run needs, and build the run's parts."""
        flat = self._context.config.to_flat()
        if warning := staleness_warning(FlatSettings(flat, given=flat, invalid=())):
            self._alerts.report(warning)
        services = await self._workers.wait_for(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        weightsync = WeightSyncClient(services[0])
        if number_types.is_open(self._context.config):
            await self._choose_number_types()
        context, config, history, status = self._context, self._context.config, self._history, self._status
        clock, activities, report = self._clock, self._activities, self._report
        recorded = None if config.debug.has_engines else RecordedGroups(context.job_id, config)
        acceptance = RunAcceptance.of_job(config, history.summary.get("acceptance", ()))
        rollouts = await self._rollouts(context, weightsync, recorded, acceptance)

        def on_active(version: int) -> None:
            dispatcher.release_hold(LOADING)
            dispatcher.release_hold(PREEMPTED)
            dispatcher.activate(version)

        def make_lease(group_id: int, attempt: int, version: int) -> rollout_pb2.GroupLease:
            if self._prompts is None:
                purpose = rollout_pb2.GROUP_PURPOSE_TRAIN
                return rollout_pb2.GroupLease(group_id=group_id, attempt=attempt, purpose=purpose)
            group = self._prompts.group(context.job_id, group_id, 1)
            if not publisher.publishes:  # engines have the initial weights whatever the step
                return training_lease(config, group, attempt, 0, 0)
            return training_lease(config, group, attempt, version, max(version, publisher.newest))

        async def leave_to_engines(trainer: Trainer) -> None:
            await turns.to_engines(trainer)

        publisher = Publisher(context, weightsync, rollouts, clock, activities, report, on_active, leave_to_engines)
        dispatcher = Dispatcher(
            rollouts,
            self._registry,
            self._queue,
            clock,
            activities,
            self._alerts,
            self._changed,
            make_lease,
            DroppedGroups(
                config.data.rollout_batch_size,
                config.rollout.dynamic_sampling_filter_path,
                config.rollout.dynamic_sampling_max_dropped_batches,
            ),
            EqualRewards(config.data.rollout_batch_size),
        )
        status.connect(rollouts, dispatcher, publisher, acceptance)
        evaluations = EvaluationSchedule(context, history, dispatcher, self._eval_sets)
        drafts = RunDrafts(context, self._registry, weightsync, rollouts, self._alerts, activities)
        status.drafts = drafts
        turns = GpuTurns(config, rollouts, dispatcher, evaluations, status, drafts)
        return RunState(
            context=context,
            history=history,
            controls=self._controls,
            registry=self._registry,
            queue=self._queue,
            clock=clock,
            activities=activities,
            status=status,
            alerts=self._alerts,
            report=report,
            workers=self._workers,
            weightsync=weightsync,
            rollouts=rollouts,
            dispatcher=dispatcher,
            publisher=publisher,
            publications=PublicationSchedule(config, publisher, evaluations, status),
            evaluations=evaluations,
            checkpoints=Checkpoints(config, history, self._controls, status, clock, activities, report, rollouts),
            prompts=self._prompts,
            recorded=recorded,
            dump=RolloutDump(config.debug, self._queue, context.run_dir),
            traces=StepTraces(context.run_dir / "traces", config.telemetry.trace_steps, self._registry, report),
            turns=turns,
            drafts=drafts,
            acceptance=acceptance,
        )

    async def _rollouts(
        self,
        context: JobContext,
        weightsync: WeightSyncClient,
        recorded: RecordedGroups | None,
        acceptance: RunAcceptance,
    ) -> Rollouts:
        """Return what delivers groups: the workers, once there are rewards for them, or the files."""
        config = context.config
        if recorded is not None:
            return RecordedRollouts(recorded, self._queue, config.data.rollout_batch_size)
        rewards = await self._workers.reward_addresses(config.reward)
        # Without a weight-sync service engines serve the weights of the checkpoint.
        address = weightsync.address if config.debug.has_trainer else ""
        return RolloutWorkers(context, self._registry, self._queue, self._alerts, address, rewards, acceptance)

    async def _choose_number_types(self) -> None:
        config = self._context.config
        chosen = await number_types.choose(config, self._workers, self._history.summary)
        config = config.replace(train_dtype=chosen.train_dtype, rollout_dtype=chosen.rollout_dtype)
        self._context = dataclasses.replace(self._context, config=config)
        await self._history.save()
        await self._report.info(str(chosen))
