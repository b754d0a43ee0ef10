"""Which of the attached draft trainers a run asks to train its draft."""

from __future__ import annotations

from miles.rpc.gen import controller_pb2
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry

_MISSING_S = 60.0
"""How long there may be no draft trainer before people are told."""


class DraftTrainers:
    """Goes round the attached ones: each holds one job, and refuses another run's."""

    def __init__(self, registry: WorkerRegistry, alerts: RunAlerts) -> None:
        self._registry = registry
        self._alerts = alerts
        self._refused: set[str] = set()
        self._loaded = ""
        """Name of the one that has loaded the job last: two would train it apart."""

    async def next(self, *, quiet: bool) -> AttachedWorker:
        """Wait for one that is to be asked; unless `quiet`, people are told when there is none for long."""
        waited_s = 0.0
        while not (attached := self._registry.alive(controller_pb2.WORKER_KIND_DRAFT_TRAINER)):
            await self._registry.wait_for_change(1.0)
            waited_s += 1.0
            if waited_s == _MISSING_S and not quiet:
                self._alerts.report(
                    "no draft trainer is attached, so that the drafts do not follow the policy; start one with "
                    "`python -m miles.services.trainer.drafts`"
                )
        return min(attached, key=lambda one: (one.worker_id in self._refused, one.worker_id != self._loaded))

    def loaded(self, worker_id: str) -> None:
        """It has loaded the job, and is the first to be asked again."""
        self._loaded = worker_id

    def refused(self, worker_id: str) -> None:
        """It cannot load the job: the others come first, until `end_round`."""
        self._refused.add(worker_id)

    def end_round(self, worker_id: str) -> bool:
        """Whether there is nobody to be asked at once after this one; all may then be asked again."""
        alive = self._registry.alive(controller_pb2.WORKER_KIND_DRAFT_TRAINER)
        if worker_id in self._refused and any(one.worker_id not in self._refused for one in alive):
            return False
        self._refused.clear()
        return True
