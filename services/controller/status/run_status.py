"""Describes what a run does now, and what it and each of its workers wait for: it shows why nothing moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.protocols import Rollout, Rollouts, Trainer
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.drafts import RunDrafts
from miles.services.controller.run.publish import Publisher
from miles.services.controller.speculation.acceptance import RunAcceptance
from miles.services.controller.status.run_waits import READING, LoadingWorker, RolloutFacts, RunFacts, waits_of
from miles.services.controller.status.waits import Wait, WaitLog, wait_from_proto
from miles.services.controller.status.worker_activity import Activity, WorkerActivities
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry

_TRAINER, _ROLLOUT = controller_pb2.WORKER_KIND_TRAINER, controller_pb2.WORKER_KIND_ROLLOUT
_DRAFT_TRAINER = controller_pb2.WORKER_KIND_DRAFT_TRAINER
_LOAD_PHASES = frozenset({"loading", "publishing", "collecting"})
"""Phases in which a run may wait for engines to load a version."""
_WAITS = {
    controller_pb2.WORKER_KIND_REWARD: "responses to score",
    controller_pb2.WORKER_KIND_WEIGHTSYNC: "the trainer's next weights",
}


class RunStatus:
    """The run loop notes what it does (`enter`, `during`); `describe` adds what its parts know."""

    def __init__(self, activities: WorkerActivities, registry: WorkerRegistry, wanted_rollouts: int) -> None:
        """`wanted_rollouts`: rollout workers that the job asks for."""
        self._activities = activities
        self._registry = registry
        self._wanted_rollouts = wanted_rollouts
        self._wait_log = WaitLog()
        self.trainer: Trainer | None = None
        """The trainer that the run works with; None while there is none."""
        self.step = 0
        self.saved_step: int | None = None
        """Steps that the newest complete checkpoint covers."""
        self.drafts: RunDrafts | None = None
        """What follows the draft trainer; None before the run's parts are built."""
        self._rollouts: Rollouts | None = None
        self._dispatcher: Dispatcher | None = None
        self._publisher: Publisher | None = None
        self._acceptance: RunAcceptance | None = None
        self._phase, self._waiting_for = "starting", READING
        self._since_unix_ns = time.time_ns()

    def connect(
        self, rollouts: Rollouts, dispatcher: Dispatcher, publisher: Publisher, acceptance: RunAcceptance
    ) -> None:
        """Describe these parts of the run too, from now on."""
        self._rollouts, self._dispatcher, self._publisher = rollouts, dispatcher, publisher
        self._acceptance = acceptance

    def enter(self, phase: str, waiting_for: str = "") -> None:
        """Note the phase that the run is in from now on."""
        if (phase, waiting_for) != (self._phase, self._waiting_for):
            self._phase, self._waiting_for = phase, waiting_for
            self._since_unix_ns = time.time_ns()

    def explain(self, waiting_for: str) -> None:
        """Note what the run waits for in its present phase."""
        self._waiting_for = waiting_for

    @contextmanager
    def during(self, phase: str, waiting_for: str = "") -> Iterator[None]:
        """The run is in a phase inside the block, and returns to the one before."""
        before = self._phase, self._waiting_for
        self.enter(phase, waiting_for)
        try:
            yield
        finally:
            self.enter(*before)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """The run waits for something inside the block, in the phase that it is in."""
        with self.during(self._phase, what):
            yield

    def describe(self, batch_size: int, workers: Sequence[AttachedWorker]) -> controller_pb2.DescribeRunResponse:
        """Describe the run as it is now; `workers` are those that are attached."""
        answer = controller_pb2.DescribeRunResponse(
            phase=self._phase,
            since_unix_ns=self._since_unix_ns,
            step=self.step,
            batch_size=batch_size,
            saved_step=self.saved_step,
            save_limit_s=deadlines.CHECKPOINT_S,
        )
        if self._publisher is not None:
            answer.newest_version = self._publisher.newest
            if self._publisher.active is not None:
                answer.active_version = self._publisher.active
        if self._dispatcher is not None:
            _add_groups(answer, self._dispatcher)
        if self._acceptance is not None:
            answer.speculation.extend(self._acceptance.engines())
        answer.waiting_for = self._all_waiting_for(batch_size)
        answer.workers.extend(self._worker(worker, answer) for worker in workers if self._has_part(worker))
        self._note_waits(answer.waiting_for)
        answer.waits.extend(wait.to_proto() for wait in self._wait_log.waits)
        if answer.waits and answer.phase == "collecting" and answer.waits[0].what != answer.waiting_for:
            answer.waiting_for = f"{answer.waiting_for}; {answer.waits[0].what}"  # which says why it has to
        return answer

    @property
    def waits(self) -> Sequence[Wait]:
        """What the run waits for, as it was described last."""
        return self._wait_log.waits

    def wait_news(self, batch_size: int) -> list[str]:
        """Return what people are to be told of what the run waits for; called about once a second."""
        self._note_waits(self._all_waiting_for(batch_size))
        return list(self._wait_log.news(time.time()))

    def _note_waits(self, waiting_for: str) -> None:
        now_s = time.time()
        self._wait_log.note(waits_of(self._facts(waiting_for, now_s)), now_s)

    def _facts(self, waiting_for: str, now_s: float) -> RunFacts:
        registry = self._registry
        clients = self._rollouts.all() if self._rollouts is not None else []
        trainer, dispatcher = self.trainer, self._dispatcher
        there = {client.worker_id for client in clients}
        lost = [worker.worker_id for worker in registry.recently_lost() if worker.registration.kind == _ROLLOUT]
        return RunFacts(
            phase=self._phase,
            waiting_for=waiting_for,
            since_s=self._since_unix_ns / 1e9,
            now_s=now_s,
            silent_s={worker.worker_id: registry.silent_s(worker.worker_id) for worker in registry.everyone()},
            lease_s=registry.ttl_s,
            heartbeat_interval_s=registry.heartbeat_interval_s,
            loading=tuple(_loading([trainer] if trainer is not None else []) + _loading(clients)),
            rollouts=tuple(map(_rollout_facts, clients)),
            wanted_rollouts=self._wanted_rollouts if self._rollouts is not None else 0,
            lost={name: registry.times_lost(name) for name in lost if name not in there},
            version=self._publisher.newest if self._publisher is not None else 0,
            engines_behind=self._publisher.engines_behind() if self._publisher is not None else "",
            failing=dispatcher.failed.describe() if dispatcher is not None else "",
            load_faults=str(self._publisher.faults) if self._publisher is not None else "",
            dropped=dispatcher.dropped.describe() if dispatcher is not None and dispatcher.dropped.telling else "",
            dropped_limit=dispatcher.dropped.limit if dispatcher is not None else 0,
            evaluation=dispatcher.evaluation_facts() if dispatcher is not None else None,
            trainer_said=trainer.stage if trainer is not None else "",
        )

    def _all_waiting_for(self, batch_size: int) -> str:
        """What the run waits for, in words; does not look at every group, which there are thousands of."""
        waiting_for = self._waiting_for or self._why_collecting(batch_size)
        if self._phase in _LOAD_PHASES and self._publisher is not None and (faults := str(self._publisher.faults)):
            return f"{waiting_for}; {faults}"
        return waiting_for

    def _why_collecting(self, batch_size: int) -> str:
        if self._phase != "collecting":
            return ""
        admission = self._dispatcher.admission if self._dispatcher is not None else None
        missing = max(0, batch_size - (len(admission.ready) if admission is not None else 0))
        if not missing:
            return f"groups that step {self.step} may not leave behind"
        lonely = self._rollouts is not None and not self._rollouts.connected()
        return f"{missing} of {batch_size} groups of step {self.step}{'; no rollout is connected' * lonely}"

    def _has_part(self, worker: AttachedWorker) -> bool:
        """Whether a worker may have work in this run: a draft trainer only where drafts are trained."""
        return worker.registration.kind != _DRAFT_TRAINER or (self.drafts is not None and self.drafts.wanted)

    def _worker(self, worker: AttachedWorker, run: controller_pb2.DescribeRunResponse) -> controller_pb2.WorkerActivity:
        activity = self._activities.current(worker.worker_id)
        busy = activity is not None and activity.name
        return controller_pb2.WorkerActivity(
            worker_id=worker.worker_id,
            activity=activity.name if activity is not None else "",
            waiting_for="" if busy else self._wait_of(worker, run),
            since_unix_ns=self._since_unix_ns if activity is None else _unix_ns(activity),
        )

    def _wait_of(self, worker: AttachedWorker, run: controller_pb2.DescribeRunResponse) -> str:
        match worker.registration.kind:
            case kind if kind == _TRAINER:
                return run.waiting_for or f"the run to go on ({run.phase})"
            case kind if kind == _ROLLOUT:
                return self._wait_of_rollout(worker.worker_id, run)
            case kind if kind == _DRAFT_TRAINER:
                return (self.drafts is not None and self.drafts.describe()) or "a run that trains drafts"
            case kind:
                return _WAITS.get(kind, "work")

    def _wait_of_rollout(self, worker_id: str, run: controller_pb2.DescribeRunResponse) -> str:
        dispatcher = self._dispatcher
        client = self._rollouts.get(worker_id) if self._rollouts is not None else None
        if dispatcher is None or client is None or not client.connected:
            return "the job to be loaded"
        if client.capacity == 0:
            return f"verified weights: {client.out_of_routing or 'it has none yet'}"
        if dispatcher.holds:
            return "; ".join(dispatcher.holds)
        if dispatcher.admission is None:
            return "the run to be loaded"
        if run.phase == "collecting":
            return "more groups to be allowed by the staleness bound"
        return f"step {run.step} to be {'published' if run.phase == 'publishing' else 'trained'}: the staleness bound"


def _loading(clients: Sequence[Rollout | Trainer]) -> list[LoadingWorker]:
    return [
        LoadingWorker(client.worker_id, client.stage, client.loading_since_s)
        for client in clients
        if client.loading_since_s is not None
    ]


def _rollout_facts(client: Rollout) -> RolloutFacts:
    return RolloutFacts(
        worker_id=client.worker_id,
        connected=client.connected,
        capacity=client.capacity,
        out_of_routing=client.out_of_routing,
        waits=tuple(map(wait_from_proto, client.progress.waits)) if client.connected else (),
    )


def _add_groups(answer: controller_pb2.DescribeRunResponse, dispatcher: Dispatcher) -> None:
    answer.holds.extend(dispatcher.holds)
    answer.running.extend(dispatcher.running_groups())
    if (admission := dispatcher.admission) is not None:
        answer.pending, answer.training = len(admission.pending), len(admission.training)
        answer.consumed = admission.consumed
        answer.ready.extend(
            controller_pb2.ReadyGroup(group_id=group_id, oldest_version=oldest)
            for group_id, oldest in sorted(admission.ready.items())
        )


def _unix_ns(activity: Activity) -> int:
    return time.time_ns() - int((time.monotonic() - activity.since_s) * 1e9)
