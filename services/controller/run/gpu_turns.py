"""Whose turn it is on GPUs that trainer and engines share.

With offload_rollout engines free their memory for the trainer's turn. With offload_train the trainer frees its own for
theirs, so that each may have all of it: engines are then loaded, and weights exported and saved, in turn alone.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.protocols import Rollouts, Trainer
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.workers.registry import AttachedWorker

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.controller.run.dispatcher import Dispatcher
    from miles.services.controller.run.drafts import RunDrafts
    from miles.services.controller.run.evaluation_schedule import EvaluationSchedule

TURN = "it is the trainer's turn on the GPUs"
"""Why no training group is leased."""


class _Holder(enum.Enum):
    NOBODY = enum.auto()
    TRAINER = enum.auto()
    ENGINES = enum.auto()


class GpuTurns:
    """Gives the GPUs to the trainer and back to the engines. Calls come one at a time."""

    def __init__(
        self,
        config: JobConfig,
        rollouts: Rollouts,
        dispatcher: Dispatcher,
        evaluations: EvaluationSchedule,
        status: RunStatus,
        drafts: RunDrafts,
    ) -> None:
        self.exclusive = False
        """Whether whatever the trainer does has to be in its turn; `meet` finds out."""
        self._shares_gpus = False
        self._config = config
        self._two_sides = config.debug.has_engines and config.debug.has_trainer
        self._engines_leave = config.cluster.offload_rollout and self._two_sides
        self._rollouts = rollouts
        self._dispatcher = dispatcher
        self._evaluations = evaluations
        self._status = status
        self._drafts = drafts
        self._holder = _Holder.NOBODY
        self._metrics: dict[str, float] = {}

    def meet(self, trainer: AttachedWorker) -> None:
        """The run works with this trainer from now on."""
        if not self._two_sides:
            return
        asked = self._config.cluster.offload_train
        self._shares_gpus = self._config.cluster.colocate and trainer.registration.num_gpus > 0
        self.exclusive = (self._shares_gpus and not self._config.train.fsdp_cpu_offload) if asked is None else asked

    @property
    def taken(self) -> bool:
        """Whether engines generate no training groups while the trainer works."""
        return self.exclusive or self._engines_leave

    def take_metrics(self) -> dict[str, float]:
        """Times and sizes of what moved since the last call."""
        taken, self._metrics = self._metrics, {}
        return taken

    async def to_trainer(self, check: Callable[[], None]) -> None:
        """Return once engines have left the GPUs. `check` raises what ends the wait.

        Waits for a running evaluation; training groups that run are preempted and resumed after the turn.
        """
        if self._holder is _Holder.TRAINER:
            return
        if self.exclusive:
            self._rollouts.may_load.clear()
        if self.taken:
            self._dispatcher.hold(TURN)
        if self._engines_leave:
            await self._evaluations.wait_until_done(check)
        if self.taken:
            await self._until_idle(check)
            with self._status.waiting_for("the draft trainer to leave the GPUs"):
                await self._drafts.leave_gpus(check)
        if self._engines_leave:
            await self._release_engines()
        self._holder = _Holder.TRAINER

    async def to_engines(self, trainer: Trainer) -> None:
        """Return once the trainer has left the GPUs; engines take memory when they need it."""
        if self._holder is _Holder.ENGINES:
            return
        if self.exclusive or self._shares_gpus:
            began = time.monotonic()
            with self._status.waiting_for("the trainer to free memory for engines"):
                moved = await trainer.release_memory(state=self.exclusive)
            self._note("train", began, moved.released_bytes)
        if self.exclusive:
            self._rollouts.may_load.set()
        if self.taken:
            self._dispatcher.release_hold(TURN)
            await self._drafts.return_to_gpus()
        self._holder = _Holder.ENGINES

    async def _until_idle(self, check: Callable[[], None]) -> None:
        """Wait for engines that load the job beside a trainer that needs all memory, and for groups to be preempted."""
        self._dispatcher.preempt()
        while self.exclusive and (loading := self._loading()):
            with self._status.waiting_for(f"{loading} to load the job, before the trainer"):
                check()
                await self._dispatcher.wait_for_change()
        while self._dispatcher.training_leases:
            with self._status.waiting_for("unfinished responses to be stored"):
                check()
                await self._dispatcher.wait_for_change()

    def _loading(self) -> str:
        """Names of engines that load the job."""
        return ", ".join(client.worker_id for client in self._rollouts.all() if client.loading_since_s is not None)

    async def _release_engines(self) -> None:
        """Free the engines' memory until the next version or request; a lost engine holds none."""
        began, released = time.monotonic(), 0
        for outcome in await asyncio.gather(
            *(client.release_memory() for client in self._rollouts.connected()), return_exceptions=True
        ):
            if not isinstance(outcome, BaseException):
                released += outcome.released_bytes
            elif not isinstance(outcome, WorkerLostError):
                raise outcome
        self._note("rollout", began, released)

    def _note(self, who: str, began: float, nbytes: int) -> None:
        self._metrics[f"perf/offload_{who}_time"] = time.monotonic() - began
        self._metrics[f"perf/offload_{who}_gb"] = nbytes / 1e9
