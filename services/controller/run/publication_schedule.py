"""Decides when the trainer's weights are published: after which steps, and whether the trainer waits for it."""

from __future__ import annotations

from collections.abc import Callable

from miles.config import JobConfig
from miles.services.controller.clients.protocols import Trainer
from miles.services.controller.run.evaluation_schedule import EvaluationSchedule
from miles.services.controller.run.publish import Publisher
from miles.services.controller.status.run_status import RunStatus


class PublicationSchedule:
    """A publication that has to wait for an evaluation is overdue until the evaluation has ended."""

    def __init__(
        self, config: JobConfig, publisher: Publisher, evaluations: EvaluationSchedule, status: RunStatus
    ) -> None:
        self._synchronous = config.rollout.max_weight_staleness == 0
        self._interval = config.weights.update_weights_interval
        self._last = 0
        self._publisher = publisher
        self._evaluations = evaluations
        self._status = status
        self._overdue = False

    def reset(self, last: int) -> None:
        """Forget an overdue publication: the trainer is back at older weights. `last` is the run's last step."""
        self._overdue, self._last = False, last

    def due(self, step: int) -> bool:
        """Return whether the weights after so many steps are to be published."""
        return step % self._interval == 0 or self._evaluations.due(step, self._last)

    async def publish_if_due(self, trainer: Trainer, step: int, check: Callable[[], None]) -> None:
        """Publish the weights after a step if they are due and no evaluation needs the version before.

        A synchronous run waits for the evaluation, and until the version is active. `check` raises what ends a wait.
        """
        self._overdue = self._overdue or self.due(step)
        if not self._overdue:
            return
        if self._synchronous or self._evaluations.due(step, self._last):
            with self._status.during("evaluating", "the evaluation of the version that engines serve"):
                await self._evaluations.wait_until_done(check)
        elif self._evaluations.running:
            return
        self._status.enter("publishing", f"engines to load version {step}")
        await self._publisher.export(trainer, step, check)
        self._overdue = False
        if self._synchronous:
            await self._publisher.wait_until_active(check)

    async def publish_overdue(self, trainer: Trainer, step: int, check: Callable[[], None]) -> None:
        """Publish what had to wait for an evaluation that has ended by now."""
        if self._overdue and not self._evaluations.running:
            await self.publish_if_due(trainer, step, check)
