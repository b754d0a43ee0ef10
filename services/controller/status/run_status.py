"""What a run does now, and what it and each of its workers wait for: for a person who wonders why nothing moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.run.admission import Admission
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.publish import Publishing
from miles.services.controller.status.worker_activity import Doing, WorkerActivity
from miles.services.controller.workers.registry import AttachedWorker

_TRAINER, _ROLLOUT = controller_pb2.WORKER_KIND_TRAINER, controller_pb2.WORKER_KIND_ROLLOUT
_WAITS = {
    controller_pb2.WORKER_KIND_REWARD: "responses to score",
    controller_pb2.WORKER_KIND_WEIGHTSYNC: "the trainer's next weights",
}


class RunStatus:
    """The run loop says what it does (`enter`, `during`); `describe` adds what its parts know."""

    def __init__(self, activity: WorkerActivity) -> None:
        self.activity = activity
        self.step = 0
        self.saved_step: int | None = None
        """Steps that the newest complete checkpoint covers."""
        self.dispatcher: Dispatcher | None = None
        self.publishing: Publishing | None = None
        self._phase, self._waiting_for = "starting", "the data to be read"
        self._since_unix_ns = time.time_ns()

    def enter(self, phase: str, waiting_for: str = "") -> None:
        """The run does something else from now on."""
        if (phase, waiting_for) != (self._phase, self._waiting_for):
            self._phase, self._waiting_for = phase, waiting_for
            self._since_unix_ns = time.time_ns()

    def explain(self, waiting_for: str) -> None:
        """Say what the run waits for in what it does since a while."""
        self._waiting_for = waiting_for

    @contextmanager
    def during(self, phase: str, waiting_for: str = "") -> Iterator[None]:
        """The run does something inside the block, and goes on with what it did before."""
        before = self._phase, self._waiting_for
        self.enter(phase, waiting_for)
        try:
            yield
        finally:
            self.enter(*before)

    def describe(self, batch_size: int, workers: Sequence[AttachedWorker]) -> controller_pb2.DescribeRunResponse:
        """The run as it is now; `workers` are those that are attached."""
        answer = controller_pb2.DescribeRunResponse(
            phase=self._phase,
            since_unix_ns=self._since_unix_ns,
            step=self.step,
            batch_size=batch_size,
            saved_step=self.saved_step,
            save_limit_s=deadlines.CHECKPOINT_S,
        )
        if self.publishing is not None:
            answer.newest_version = self.publishing.newest
            if self.publishing.active is not None:
                answer.active_version = self.publishing.active
        if self.dispatcher is not None:
            _add_groups(answer, self.dispatcher)
        answer.waiting_for = self._waiting_for or self._why_collecting(answer)
        answer.workers.extend(self._worker(worker, answer) for worker in workers)
        return answer

    def _why_collecting(self, answer: controller_pb2.DescribeRunResponse) -> str:
        if self._phase != "collecting":
            return ""
        missing = max(0, answer.batch_size - len(answer.ready))
        if not missing:
            return f"groups that step {self.step} may not leave behind"
        lonely = self.dispatcher is not None and not self.dispatcher.connected()
        return f"{missing} of {answer.batch_size} groups of step {self.step}{'; no rollout is connected' * lonely}"

    def _worker(self, worker: AttachedWorker, run: controller_pb2.DescribeRunResponse) -> controller_pb2.WorkerDoing:
        doing = self.activity.doing(worker.worker_id)
        busy = doing is not None and doing.activity
        return controller_pb2.WorkerDoing(
            worker_id=worker.worker_id,
            activity=doing.activity if doing is not None else "",
            waiting_for="" if busy else self._wait_of(worker, run),
            since_unix_ns=self._since_unix_ns if doing is None else _unix_ns(doing),
        )

    def _wait_of(self, worker: AttachedWorker, run: controller_pb2.DescribeRunResponse) -> str:
        match worker.registration.kind:
            case kind if kind == _TRAINER:
                return run.waiting_for or f"the run to go on ({run.phase})"
            case kind if kind == _ROLLOUT:
                return self._wait_of_rollout(worker.worker_id, run)
            case kind:
                return _WAITS.get(kind, "work")

    def _wait_of_rollout(self, worker_id: str, run: controller_pb2.DescribeRunResponse) -> str:
        dispatcher = self.dispatcher
        link = dispatcher.links.get(worker_id) if dispatcher is not None else None
        if dispatcher is None or link is None or not link.connected:
            return "the job to be loaded"
        if link.capacity == 0:
            return "verified weights: it is out of routing or has none yet"
        if dispatcher.holds:
            return "; ".join(sorted(dispatcher.holds))
        if dispatcher.admission is None:
            return "the run to be loaded"
        if run.phase == "collecting":
            return "more groups to be allowed by the staleness bound"
        return f"step {run.step} to be {'published' if run.phase == 'publishing' else 'trained'}: the staleness bound"


def _add_groups(answer: controller_pb2.DescribeRunResponse, dispatcher: Dispatcher) -> None:
    answer.holds.extend(sorted(dispatcher.holds))
    admission: Admission | None = dispatcher.admission
    if admission is not None:
        answer.pending, answer.training = len(admission.pending), len(admission.training)
        answer.consumed = admission.consumed
        answer.ready.extend(
            controller_pb2.ReadyGroup(group_id=group_id, oldest_version=oldest)
            for group_id, oldest in sorted(admission.ready.items())
        )
    for evaluation, leases in (
        (False, admission.leases if admission is not None else {}),
        (True, dispatcher.evaluation.leases if dispatcher.evaluation is not None else {}),
    ):
        for group_id, lease in sorted(leases.items()):
            answer.running.add(
                group_id=group_id,
                worker_id=lease.worker_id,
                attempt=lease.attempt,
                since_unix_ns=dispatcher.leased_since(evaluation, group_id),
                evaluation=evaluation,
            )


def _unix_ns(doing: Doing) -> int:
    return time.time_ns() - int((time.monotonic() - doing.since_s) * 1e9)
