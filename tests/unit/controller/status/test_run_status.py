"""What is said of a run that moves, waits, or stands still."""

from __future__ import annotations

import asyncio

from miles.rpc.gen import controller_pb2
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry


def worker(worker_id: str, kind: controller_pb2.WorkerKind.ValueType) -> AttachedWorker:
    registration = controller_pb2.WorkerRegistration(worker_id=worker_id, kind=kind)
    return AttachedWorker(registration, 1, controller_pb2.WorkerHeartbeat(), 0, asyncio.Event())


TRAINER = worker("trainer-0", controller_pb2.WORKER_KIND_TRAINER)
REWARD = worker("reward-0", controller_pb2.WORKER_KIND_REWARD)
ROLLOUT = worker("rollout-0", controller_pb2.WORKER_KIND_ROLLOUT)


def test_a_worker_is_at_something_or_waits_for_something() -> None:
    activities = WorkerActivities(lambda *_: None)
    status = RunStatus(activities, WorkerRegistry(), 1)
    status.step = 3
    status.enter("training")
    with activities.during("trainer-0", "train"):
        busy, *idle = status.describe(4, [TRAINER, REWARD, ROLLOUT]).workers
    assert (busy.activity, busy.waiting_for) == ("train", "")
    assert [(each.activity, each.waiting_for) for each in idle] == [
        ("", "responses to score"),
        ("", "the job to be loaded"),
    ]
    status.enter("collecting")
    described = status.describe(4, [TRAINER])
    assert described.waiting_for == described.workers[0].waiting_for == "4 of 4 groups of step 3"


def test_a_phase_lasts_until_another_begins() -> None:
    status = RunStatus(WorkerActivities(lambda *_: None), WorkerRegistry(), 1)
    status.enter("collecting")
    since = status.describe(1, []).since_unix_ns
    status.enter("collecting")
    assert status.describe(1, []).since_unix_ns == since
    with status.during("saving", "the checkpoint to be written"):
        saving = status.describe(1, [])
        assert (saving.phase, saving.waiting_for) == ("saving", "the checkpoint to be written")
        assert saving.since_unix_ns > since
    assert status.describe(1, []).phase == "collecting"


def test_what_a_phase_waits_for_may_change_while_it_lasts() -> None:
    status = RunStatus(WorkerActivities(lambda *_: None), WorkerRegistry(), 1)
    status.enter("training")
    before = status.describe(1, [])
    assert (before.waiting_for, before.HasField("saved_step")) == ("", False)
    status.explain("the end of the step")
    status.saved_step = 8
    after = status.describe(1, [])
    assert (after.waiting_for, after.since_unix_ns, after.saved_step) == (
        "the end of the step",
        before.since_unix_ns,
        8,
    )
