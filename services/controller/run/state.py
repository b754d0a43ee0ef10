"""The state of one run: its parts and its current step. It outlives the loss of a worker."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from miles.config import JobConfig
from miles.services.controller.clients.protocols import Rollouts
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.checkpoints import Checkpoints
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.drafts import RunDrafts
from miles.services.controller.run.evaluation_schedule import EvaluationSchedule
from miles.services.controller.run.gpu_turns import GpuTurns
from miles.services.controller.run.publication_schedule import PublicationSchedule
from miles.services.controller.run.publish import Publisher
from miles.services.controller.run.recorded_rollouts import RecordedGroups
from miles.services.controller.run.report import RunReport
from miles.services.controller.run.rollout_dump import RolloutDump
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

LOADING, PREEMPTED, PAUSED = "loading", "a batch is complete", "paused by the user"
"""Why no training group is leased."""


@dataclasses.dataclass
class RunState:
    """The parts of one run. `setup` makes it; `recovery`, `resume` and `loop` work with it."""

    context: JobContext
    history: JobHistory
    controls: JobControls
    registry: WorkerRegistry
    queue: GroupQueue
    clock: ActivityClock
    activities: WorkerActivities
    status: RunStatus
    alerts: RunAlerts
    report: RunReport
    workers: RequiredWorkers
    weightsync: WeightSyncClient
    rollouts: Rollouts
    dispatcher: Dispatcher
    publisher: Publisher
    publications: PublicationSchedule
    evaluations: EvaluationSchedule
    checkpoints: Checkpoints
    prompts: PromptSource | None
    """None in a run without engines."""
    recorded: RecordedGroups | None
    """What such a run trains on instead."""
    dump: RolloutDump
    traces: StepTraces
    turns: GpuTurns
    drafts: RunDrafts
    acceptance: RunAcceptance
    step: int = 0
    """Training steps taken, which is also the version of the trainer's weights."""
    step_began: float = 0.0
    """When the run came to this step, in seconds of the monotonic clock."""
    last: int = 0
    """Steps of the run in all, which is also its last version; `resume` sets it."""
    loaded_before: bool = False
    """Whether the workers have loaded the job once."""

    @property
    def config(self) -> JobConfig:
        return self.context.config

    def move_to(self, step: int) -> None:
        """Note the step that the run is at."""
        self.step = self.status.step = self.history.timeline.step = step
