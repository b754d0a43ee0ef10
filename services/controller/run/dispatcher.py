"""Keeps the rollouts of a job busy: links to every live worker, leases out, results into admission."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.rollout import RolloutLink
from miles.services.controller.jobs import number_types
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.admission import Admission
from miles.services.controller.run.evaluation import Evaluation
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.worker_activity import WorkerActivity
from miles.services.controller.workers.load_balance import LoadBalance
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.workers.reward_addresses import DEFAULT, RewardAddresses

if TYPE_CHECKING:
    from miles.queue import GroupQueue

logger = logging.getLogger(__name__)

_MAX_FAILURES = 5
"""Failed attempts of one group before it is dropped."""
_MAX_FAILED_IN_A_ROW = 32
"""Groups dropped for failures, with none accepted between, before the job fails: something is wrong for all of them."""
_FENCE_DEADLINE_S = 600.0
_LEASES_AT_ONCE = 64
"""Leases handed out before the event loop gets to hear workers again: about 10 ms."""

LeaseMaker = Callable[[int, int, int], rollout_pb2.GroupLease]
"""(group id, attempt, version) -> the lease of a training group."""


class Dispatcher:
    """Carries out what admission decides.

    `admission` is None while nothing may be admitted (before the first version).
    """

    def __init__(
        self,
        context: JobContext,
        registry: WorkerRegistry,
        queue: GroupQueue,
        clock: ActivityClock,
        activity: WorkerActivity,
        make_lease: LeaseMaker,
        weightsync_address: str,
        reward_addresses: RewardAddresses,
    ) -> None:
        self._context = context
        self._registry = registry
        self._queue = queue
        self._clock = clock
        self._activity = activity
        self._leased_unix_ns: dict[tuple[bool, int], int] = {}
        self._make_lease = make_lease
        self._weightsync_address = weightsync_address
        self._reward_addresses = reward_addresses
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._balance = LoadBalance()
        self._changed = asyncio.Event()
        self._more = asyncio.Event()
        """Set while more groups may be handed out than were."""
        self._generating = False
        self._failures: Counter[int] = Counter()
        self._failed_in_a_row = 0
        self._generated_before = 0
        self.links: dict[str, RolloutLink] = {}
        self.admission: Admission | None = None
        self.holds: set[str] = set()
        """Why no training group is handed out now; what runs goes on."""
        self.evaluation: Evaluation | None = None
        self.given_up: dict[int, str] = {}
        """Groups dropped here for failing, with the reason, that the queue has not been told of."""
        self.failure: Exception | None = None
        """What makes it pointless to go on."""
        self.warnings: list[str] = []
        """Things a person should be told; the run loop takes them."""

    @property
    def generated_tokens(self) -> int:
        """Response tokens that all workers have generated, those that are gone included."""
        return self._generated_before + sum(link.progress.generated_tokens for link in self.links.values())

    async def run(self) -> None:
        """Keep links to all live rollouts until cancelled."""
        handing_out = asyncio.create_task(self._go_on_handing_out())
        handing_out.add_done_callback(self._note_failure)
        try:
            while True:
                for worker in self._registry.alive(controller_pb2.WORKER_KIND_ROLLOUT):
                    if worker.worker_id not in self._tasks:
                        task = self._tasks[worker.worker_id] = asyncio.create_task(self._serve(worker))
                        task.add_done_callback(self._note_failure)
                await self._registry.wait_for_change(1.0)
        finally:
            tasks = [handing_out, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def connected(self) -> list[RolloutLink]:
        """Links to workers that have loaded the job, by name."""
        return sorted((link for link in self.links.values() if link.connected), key=lambda link: link.worker_id)

    async def wait_for_change(self, timeout_s: float = 1.0) -> None:
        """Return when something about the groups or links changed, or after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def pump(self) -> None:
        """Hand out groups while some may run and some worker has room: some at once, the others soon."""
        for _ in range(_LEASES_AT_ONCE):
            worker_id = self._balance.next()
            lease = None if worker_id is None else self._next_lease(worker_id)
            if worker_id is None or lease is None:
                break
            self.links[worker_id].lease(lease)
            self._balance.take(worker_id)
            self._leased_unix_ns[lease.purpose == rollout_pb2.GROUP_PURPOSE_EVAL, lease.group_id] = time.time_ns()
            if self._balance.held(worker_id) == 1:
                self._activity.begin(worker_id, "generate")
        else:
            self._more.set()
        self._watch_activity()

    def leased_since(self, evaluation: bool, group_id: int) -> int:
        """When a group was leased last, in nanoseconds since the Unix epoch; 0 when that is not known."""
        return self._leased_unix_ns.get((evaluation, group_id), 0)

    def interrupt(self) -> None:
        """Have every training group that runs given up; what there is of it is kept."""
        if self.admission is None:
            return
        for group_id, lease in self.admission.leases.items():
            if (link := self.links.get(lease.worker_id)) is not None:
                link.cancel(group_id, lease.attempt, rollout_pb2.GROUP_PURPOSE_TRAIN)

    def end_evaluation(self) -> None:
        """Have the groups of an evaluation that is not wanted any more given up."""
        if self.evaluation is None:
            return
        for group_id, lease in self.evaluation.leases.items():
            if (link := self.links.get(lease.worker_id)) is not None:
                link.cancel(group_id, lease.attempt, rollout_pb2.GROUP_PURPOSE_EVAL)
        self.evaluation = None
        self._watch_activity()

    def _next_lease(self, worker_id: str) -> rollout_pb2.GroupLease | None:
        if self.evaluation is not None and (lease := self.evaluation.lease(worker_id)) is not None:
            return lease
        if self.admission is None or self.holds:
            return None
        given = self.admission.lease(worker_id)
        return None if given is None else self._make_lease(*given, self.admission.version)

    async def _go_on_handing_out(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            await asyncio.sleep(0)
            self.pump()

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """Have the job end by an error that nobody foresaw, instead of waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self.notify()

    async def _serve(self, worker: AttachedWorker) -> None:
        """Work with one worker for as long as its lease and its stream last."""
        link = RolloutLink(worker, self._context, self._weightsync_address, self._reward_addresses.of(worker.worker_id))
        self.links[link.worker_id] = link
        if warning := number_types.warning_of(worker, self._context.config.rollout.rollout_dtype):
            self.warnings.append(warning)
        try:
            await self._queue.fence(link.worker_id, worker.lease_number, deadline_s=_FENCE_DEADLINE_S)
            try:
                await self._work_until_lost(link)
            finally:
                self._balance.remove(link.worker_id)
            if worker.lost.is_set():
                # A worker that hangs may wake up and finish what others have got by then.
                await self._queue.fence(link.worker_id, worker.lease_number + 1, deadline_s=_FENCE_DEADLINE_S)
        except WorkerFailedError as error:
            self.failure = error
        except TRANSIENT as error:
            self.failure = WorkerFailedError(f"Redis was away for {_FENCE_DEADLINE_S:g} s: {error}")
        finally:
            self._unlink(link)

    async def _work_until_lost(self, link: RolloutLink) -> None:
        lost = asyncio.create_task(link.worker.lost.wait())
        serving = asyncio.create_task(link.serve(self._on_response))
        try:
            await asyncio.wait({lost, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        except WorkerLostError as error:
            logger.info("lost rollout %s: %s", link.worker_id, error)
            self.warnings.append(f"rollout {link.worker_id} lost: {error}")
        finally:
            lost.cancel()
            serving.cancel()
            await asyncio.gather(lost, serving, return_exceptions=True)

    def _unlink(self, link: RolloutLink) -> None:
        self._generated_before += link.progress.generated_tokens
        self._activity.end(link.worker_id)
        del self.links[link.worker_id], self._tasks[link.worker_id]
        if self.admission is not None:
            lost = self.admission.lose_worker(link.worker_id)
            if lost:
                logger.info("groups %s of rollout %s will be leased again", lost, link.worker_id)
        if self.evaluation is not None:
            self.evaluation.lose_worker(link.worker_id)
        self.pump()
        self.notify()

    def _on_response(self, link: RolloutLink, response: rollout_pb2.RunResponse) -> None:
        kind = response.WhichOneof("kind")
        if kind == "progress":
            return
        if kind == "ready":
            self._balance.set_capacity(link.worker_id, link.capacity)
        else:
            self._balance.give(link.worker_id)
            if not self._balance.held(link.worker_id):
                self._activity.end(link.worker_id)
        if kind == "finished":
            self._on_finished(link, response.finished)
        elif kind == "failed":
            self._on_failed(response.failed)
        elif kind == "preempted":
            self._on_returned(response.preempted)
        self.pump()
        self.notify()

    def _on_finished(self, link: RolloutLink, message: rollout_pb2.GroupFinished) -> None:
        self._leased_unix_ns.pop((message.purpose == rollout_pb2.GROUP_PURPOSE_EVAL, message.group_id), None)
        if message.stats.reward_s > 0:
            self._note_scoring(link, message.stats.reward_s)
        if message.purpose == rollout_pb2.GROUP_PURPOSE_EVAL:
            if self.evaluation is not None:
                self.evaluation.finish(message)
            return
        if self.admission is None:
            return
        self._failures.pop(message.group_id, None)
        if message.verdict == rollout_pb2.FILTER_VERDICT_DROP:
            if self.admission.drop(message.group_id, message.attempt):
                logger.info("group %d dropped: %s", message.group_id, message.reason)
        elif self.admission.accept(message.group_id, message.attempt, message.oldest_version):
            self._failed_in_a_row = 0
            if not self.admission.leases:
                self._clock.move("generate", "reward", message.stats.reward_s)

    def _note_scoring(self, link: RolloutLink, seconds: float) -> None:
        for worker in self._registry.at(link.reward_addresses[DEFAULT]):
            if worker.registration.kind == controller_pb2.WORKER_KIND_REWARD:
                self._activity.note(worker.worker_id, "score", seconds)

    def _on_failed(self, message: rollout_pb2.GroupFailed) -> None:
        if message.purpose == rollout_pb2.GROUP_PURPOSE_EVAL:
            if self.evaluation is not None:
                self.evaluation.fail(message.group_id, message.attempt, message.error)
            return
        if self.admission is None:
            return
        self._failures[message.group_id] += 1
        if message.retryable and self._failures[message.group_id] < _MAX_FAILURES:
            if self.admission.give_back(message.group_id, message.attempt):
                self.warnings.append(f"group {message.group_id} failed and is tried again: {message.error}")
            return
        if self.admission.drop(message.group_id, message.attempt):
            del self._failures[message.group_id]
            self.given_up[message.group_id] = message.error
            self.warnings.append(f"group {message.group_id} dropped after a failure: {message.error}")
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _MAX_FAILED_IN_A_ROW:
                self.failure = WorkerFailedError(
                    f"{self._failed_in_a_row} groups in a row failed and were dropped; the last: {message.error}"
                )

    def _on_returned(self, message: rollout_pb2.GroupPreempted) -> None:
        if message.purpose == rollout_pb2.GROUP_PURPOSE_EVAL:
            if self.evaluation is not None:
                self.evaluation.give_back(message.group_id, message.attempt)
        elif self.admission is not None:
            self.admission.give_back(message.group_id, message.attempt)

    def _watch_activity(self) -> None:
        leased = bool(self.admission and self.admission.leases) or bool(self.evaluation and self.evaluation.leases)
        if leased != self._generating:
            self._generating = leased
            (self._clock.begin if leased else self._clock.end)("generate")
