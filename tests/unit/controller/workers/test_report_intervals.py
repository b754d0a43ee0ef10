from __future__ import annotations

from miles.rpc.gen import controller_pb2
from miles.services.controller.workers.registry import WorkerRegistry
from miles.services.controller.workers.report_intervals import report_interval_s


def test_thousands_of_workers_report_less_often() -> None:
    assert report_interval_s(1, 1.0) == 1.0
    assert report_interval_s(4000, 1.0) == 8.0


async def test_heartbeats_come_several_times_within_a_lease_however_many_workers_there_are() -> None:
    registry = WorkerRegistry(ttl_s=20.0)
    assert registry.heartbeat_interval_s == 2.0
    for i in range(5000):
        name = f"rollout-{i}"
        kind = controller_pb2.WORKER_KIND_ROLLOUT
        registry.attach(controller_pb2.WorkerRegistration(worker_id=name, kind=kind, address=name, incarnation="1"))
    assert registry.heartbeat_interval_s == 5.0
