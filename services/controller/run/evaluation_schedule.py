"""Decides when a version is evaluated, runs the evaluation in the background, and records its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.history import LAST_EVALUATED, JobHistory
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.evaluation import Evaluation
from miles.tasks import cancel

if TYPE_CHECKING:
    from miles.data import PromptSource


class EvaluationSchedule:
    """At most one evaluation at a time, each of one version, which must stay active until its last response."""

    def __init__(
        self,
        context: JobContext,
        history: JobHistory,
        dispatcher: Dispatcher,
        datasets: Mapping[str, PromptSource],
    ) -> None:
        self._context = context
        self._config = context.config.eval
        self._history = history
        self._dispatcher = dispatcher
        self._datasets = datasets
        self._evaluation: Evaluation | None = None
        """The newest one, running or not."""
        self._task: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Version that is being evaluated or was evaluated last; -1 before the first."""
        return -1 if self._evaluation is None else self._evaluation.version

    @property
    def running(self) -> bool:
        """Whether a version must stay active for an evaluation."""
        return self._task is not None and not self._task.done()

    def due(self, version: int, last: int) -> bool:
        """Return whether a version has to be evaluated and was not; `last` is the job's last version."""
        interval = self._config.eval_interval
        if interval is None or not self._datasets or self._history.summary.get(LAST_EVALUATED, -1) >= version:
            return False
        if version == 0:
            return not self._config.skip_eval_before_train
        if not self._context.config.debug.has_trainer:
            return False  # it is the same policy as version 0
        return version % interval == 0 or version == last

    def start(self, version: int) -> None:
        """Evaluate a version that is active or about to be."""
        attempts = 0 if self._evaluation is None else self._evaluation.attempts
        self._evaluation = Evaluation(self._context.job_id, self._context.config, self._datasets, version, attempts)
        self._task = asyncio.create_task(self._evaluate(self._evaluation))
        self._dispatcher.start_evaluation(self._evaluation)

    async def wait_until_done(self, check: Callable[[], None]) -> None:
        """Wait for a running evaluation; `check`, called about once a second, raises what ends the wait."""
        while self.running:
            assert self._task is not None
            check()
            self._dispatcher.lease_groups()
            await asyncio.wait({self._task}, timeout=1.0)
        self.check()

    def check(self) -> None:
        """Raise the error of an evaluation that has failed."""
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()

    async def cancel(self) -> None:
        """Cancel a running evaluation."""
        if self._task is not None:
            await cancel(self._task)
            self._task = None
        self._dispatcher.end_evaluation()

    def forget_after(self, version: int) -> None:
        """Evaluate versions after this one again: the job is back at it, and later ones will be other weights."""
        if self._history.summary.get(LAST_EVALUATED, -1) > version:
            self._history.summary[LAST_EVALUATED] = version

    async def _evaluate(self, evaluation: Evaluation) -> None:
        metrics = await evaluation.wait()
        self._dispatcher.end_evaluation()
        # Version v is the policy that step v samples with and trains; after the last step there is one more version.
        await self._history.metrics(evaluation.version, metrics)
        summary = self._history.summary
        results = summary.setdefault("eval", {})
        scores = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.count("/") == 1}
        results["after"] = scores
        if evaluation.version == 0:
            results["before"] = scores
        summary[LAST_EVALUATED] = evaluation.version
        await self._history.save()
