"""Leases groups to the rollouts of a job, and passes their results to admission and to the evaluation."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miles.change_signal import ChangeSignal
from miles.reward_names import DEFAULT_SERVICE
from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.services.controller.clients.calls import WorkerFailedError
from miles.services.controller.clients.protocols import Rollout, Rollouts
from miles.services.controller.run.admission import Admission
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.dropped_groups import DroppedGroups
from miles.services.controller.run.equal_rewards import EqualRewards
from miles.services.controller.run.evaluation import Evaluation
from miles.services.controller.run.failed_groups import FailedGroups
from miles.services.controller.run.group_leases import GroupLease
from miles.services.controller.run.preempted_groups import PreemptedGroups
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.run_waits import EvaluationFacts
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.load_balance import LoadBalance
from miles.services.controller.workers.registry import WorkerRegistry
from miles.tasks import cancelled_at_end
from miles.telemetry.tracing import traced

if TYPE_CHECKING:
    from miles.queue import GroupQueue

logger = logging.getLogger(__name__)

_LEASES_AT_ONCE = 64
"""Leases made before the event loop can read from workers again: about 10 ms."""
_EVAL = rollout_pb2.GROUP_PURPOSE_EVAL

LeaseMaker = Callable[[int, int, int], rollout_pb2.GroupLease]
"""(group id, attempt, version) -> the lease of a training group."""


class Dispatcher:
    """Carries out what admission and the evaluation decide. Listens to the rollouts."""

    def __init__(
        self,
        rollouts: Rollouts,
        registry: WorkerRegistry,
        queue: GroupQueue,
        clock: ActivityClock,
        activities: WorkerActivities,
        alerts: RunAlerts,
        changed: ChangeSignal,
        make_lease: LeaseMaker,
        dropped: DroppedGroups,
        equal_rewards: EqualRewards,
    ) -> None:
        self._rollouts = rollouts
        self._registry = registry
        self._queue = queue
        self._clock = clock
        self._activities = activities
        self._alerts = alerts
        self._changed = changed
        self._make_lease = make_lease
        self._admission: Admission | None = None
        self._evaluation: Evaluation | None = None
        self._holds: set[str] = set()
        self._balance = LoadBalance()
        self.failed = FailedGroups()
        self._preempted = PreemptedGroups()
        self.dropped = dropped
        self._equal_rewards = equal_rewards
        self._dropped: dict[int, str] = {}
        """Groups dropped for failures, with the reason, that the queue does not know yet."""
        self._leased_unix_ns: dict[tuple[bool, int], int] = {}
        self._more = asyncio.Event()
        """Set while more groups may be leased than were."""
        self._generating = False

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def admission(self) -> Admission | None:
        """What decides which training groups may run; None while none may."""
        return self._admission

    @property
    def training_leases(self) -> Mapping[int, GroupLease]:
        """Leases of training groups; the mapping changes as groups are leased and finish."""
        return {} if self._admission is None else self._admission.leases

    @property
    def holds(self) -> list[str]:
        """Why no training group is leased now, beside the rules of admission."""
        return sorted(self._holds)

    def evaluation_facts(self) -> EvaluationFacts | None:
        """Return how far the evaluation is that runs; None when none does."""
        return None if self._evaluation is None else self._evaluation.facts()

    def running_groups(self) -> list[controller_pb2.RunningGroup]:
        """Describe every group that is leased: training groups, then those of the evaluation."""
        evaluation = {} if self._evaluation is None else self._evaluation.leases
        return [
            controller_pb2.RunningGroup(
                group_id=group_id,
                worker_id=lease.worker_id,
                attempt=lease.attempt,
                since_unix_ns=self._leased_unix_ns.get((is_evaluation, group_id), 0),
                evaluation=is_evaluation,
            )
            for is_evaluation, leases in ((False, self.training_leases), (True, evaluation))
            for group_id, lease in sorted(leases.items())
        ]

    async def wait_for_change(self) -> None:
        """Return when something about the groups or workers changed, or after a second."""
        await self._changed.wait(1.0)

    # -- commands -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work with all live rollouts until cancelled."""
        leasing = asyncio.create_task(self._keep_leasing())
        self._alerts.watch(leasing)
        async with cancelled_at_end(leasing):
            await self._rollouts.run(self)

    def admit(self, admission: Admission) -> None:
        """Lease training groups as this admission allows."""
        self._admission = admission

    def stop_admitting(self) -> None:
        """Lease no training groups, and ignore the results of those that run."""
        self._admission = None

    def hold(self, reason: str) -> None:
        """Lease no training groups until the hold is released; those that run continue."""
        self._holds.add(reason)

    def release_hold(self, reason: str) -> None:
        """Release a hold; training groups are leased once there is none."""
        self._holds.discard(reason)

    def activate(self, version: int) -> None:
        """Engines serve a new version: admit what it allows."""
        if self._admission is not None:
            self._admission.activate(version)
        self.lease_groups()
        self._changed.notify()

    def preempt(self) -> None:
        """Preempt every training group that runs; its unfinished responses are stored and resumed later."""
        self._preempt(self.training_leases, rollout_pb2.GROUP_PURPOSE_TRAIN)

    def start_evaluation(self, evaluation: Evaluation) -> None:
        """Lease the groups of an evaluation ahead of training groups."""
        self._evaluation = evaluation
        self.lease_groups()

    def end_evaluation(self) -> None:
        """Lease no more groups of the evaluation and preempt those that run."""
        if self._evaluation is not None:
            for warning in self._evaluation.warnings:
                self._alerts.report(warning)
            self._preempt(self._evaluation.leases, _EVAL)
            self._evaluation = None
            self._watch_activity()

    async def record_drops(self) -> None:
        """Have the queue remember groups dropped for failures, as rollouts do for those that a filter drops."""
        while self._dropped:
            group_id, reason = next(iter(self._dropped.items()))
            await self._queue.drop(group_id, reason)
            del self._dropped[group_id]

    # -- leasing ------------------------------------------------------------------------------------------------------

    @traced("lease groups")
    def lease_groups(self) -> None:
        """Lease groups while some may run and some worker has room: a few at once, the others soon."""
        for _ in range(_LEASES_AT_ONCE):
            worker_id = self._balance.next()
            client = None if worker_id is None else self._rollouts.get(worker_id)
            lease = None if client is None else self._next_lease(client.worker_id)
            if client is None or lease is None:
                break
            client.lease(lease)
            self._balance.add_group(client.worker_id)
            self._leased_unix_ns[lease.purpose == _EVAL, lease.group_id] = time.time_ns()
            if self._balance.groups_of(client.worker_id) == 1:
                self._activities.begin(client.worker_id, "generate")
        else:
            self._more.set()
        self._watch_activity()

    def _next_lease(self, worker_id: str) -> rollout_pb2.GroupLease | None:
        if self._evaluation is not None and (lease := self._evaluation.lease(worker_id)) is not None:
            return lease
        if self._admission is None or self._holds:
            return None
        admitted = self._admission.lease(worker_id)
        return None if admitted is None else self._make_lease(*admitted, self._admission.version)

    async def _keep_leasing(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            await asyncio.sleep(0)
            self.lease_groups()

    def _preempt(self, leases: Mapping[int, GroupLease], purpose: rollout_pb2.GroupPurpose.ValueType) -> None:
        for group_id, lease in leases.items():
            if (client := self._rollouts.get(lease.worker_id)) is not None:
                client.preempt(group_id, lease.attempt, purpose)

    # -- what rollouts send -------------------------------------------------------------------------------------------

    @traced("take in a response")
    def on_response(self, client: Rollout, response: rollout_pb2.RunResponse) -> None:
        """Take in a result or a new capacity, and lease what it makes possible."""
        kind = response.WhichOneof("kind")
        if kind == "progress":
            return
        if kind == "ready":
            self._balance.set_capacity(client.worker_id, client.capacity)
        else:
            self._balance.remove_group(client.worker_id)
            if not self._balance.groups_of(client.worker_id):
                self._activities.end(client.worker_id)
        if kind == "finished":
            self._on_finished(client, response.finished)
        elif kind == "failed":
            self._on_failed(response.failed)
        elif kind == "preempted":
            self._on_preempted(response.preempted)
        self.lease_groups()
        if kind != "finished" or self._matters_to_the_loop():
            self._changed.notify()

    def _matters_to_the_loop(self) -> bool:
        """Whether a finished group may be what somebody waits for: few of thousands a second are."""
        admission = self._admission
        return admission is None or not admission.leases or admission.may_begin_step

    def on_disconnected(self, client: Rollout) -> None:
        """Lease nothing more to a worker whose stream has ended."""
        self._balance.remove_worker(client.worker_id)

    def on_lost(self, client: Rollout) -> None:
        """Lease a lost worker's groups to others."""
        self._activities.end(client.worker_id)
        if self._admission is not None and (lost := self._admission.lose_worker(client.worker_id)):
            logger.info("groups %s of rollout %s will be leased again", lost, client.worker_id)
        if self._evaluation is not None:
            self._evaluation.lose_worker(client.worker_id)
        self.lease_groups()
        self._changed.notify()

    def _on_finished(self, client: Rollout, message: rollout_pb2.GroupFinished) -> None:
        self._leased_unix_ns.pop((message.purpose == _EVAL, message.group_id), None)
        if message.stats.reward_s > 0:
            self._note_scoring(client, message.stats.reward_s)
        if message.purpose == _EVAL:
            if self._evaluation is not None:
                self._evaluation.finish(message)
            return
        if self._admission is None:
            return
        self.failed.finish(message.group_id)
        self._preempted.finish(message.group_id)
        if message.verdict == rollout_pb2.FILTER_VERDICT_DROP:
            if self._admission.drop(message.group_id, message.attempt):
                self._note_drop(message)
        elif self._admission.accept(message.group_id, message.attempt, message.oldest_version):
            self.failed.accept()
            self.dropped.keep()
            if warning := self._equal_rewards.note(message.example if message.HasField("example") else None):
                self._alerts.report(warning)
            if not self._admission.leases:
                self._clock.move("generate", "reward", message.stats.reward_s)

    def _note_drop(self, message: rollout_pb2.GroupFinished) -> None:
        logger.debug("group %d dropped: %s", message.group_id, message.reason)
        if self.dropped.drop(message.reason, message.example if message.HasField("example") else None):
            self._alerts.report(self.dropped.describe())
        if self.dropped.too_many:
            self._alerts.fail(WorkerFailedError(self.dropped.failure()))

    def _note_scoring(self, client: Rollout, seconds: float) -> None:
        for worker in self._registry.at(client.reward_addresses.get(DEFAULT_SERVICE, "")):
            if worker.registration.kind == controller_pb2.WORKER_KIND_REWARD:
                self._activities.note(worker.worker_id, "score", seconds)

    def _on_failed(self, message: rollout_pb2.GroupFailed) -> None:
        self._leased_unix_ns.pop((message.purpose == _EVAL, message.group_id), None)
        if message.purpose == _EVAL:
            if self._evaluation is not None:
                self._evaluation.fail(message.group_id, message.attempt, message.error)
            return
        if self._admission is None:
            return
        self._preempted.finish(message.group_id)
        if self.failed.may_retry(message.group_id, message.retryable, message.error):
            if self._admission.requeue(message.group_id, message.attempt):
                self._alerts.warn(f"group {message.group_id} failed and is retried: {message.error}")
        elif self._admission.drop(message.group_id, message.attempt):
            self._dropped[message.group_id] = message.error
            self._alerts.warn(f"group {message.group_id} dropped after a failure: {message.error}")
            if self.failed.drop(message.group_id):
                count = self.failed.dropped_in_a_row
                problem = f"{count} groups in a row failed and were dropped; the last: {message.error}"
                self._alerts.fail(WorkerFailedError(problem))

    def _on_preempted(self, message: rollout_pb2.GroupPreempted) -> None:
        if message.purpose == _EVAL:
            if self._evaluation is not None:
                self._evaluation.requeue(message.group_id, message.attempt)
        elif (
            self._admission is not None
            and self._admission.requeue(message.group_id, message.attempt)
            and (warning := self._preempted.preempt(message.group_id, message.saved_tokens))
        ):
            self._alerts.warn(warning)

    def _watch_activity(self) -> None:
        leased = bool(self.training_leases) or bool(self._evaluation and self._evaluation.leases)
        if leased != self._generating:
            self._generating = leased
            (self._clock.begin if leased else self._clock.end)("generate")
