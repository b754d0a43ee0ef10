"""The evaluations of a job: when one is due, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.evaluation import Evaluation

if TYPE_CHECKING:
    from miles.data import PromptSource

_LAST_VERSION = "last_evaluated_version"


class Evaluations:
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
        self._attempts = 0
        self._task: asyncio.Task[None] | None = None
        self.version = -1
        """Version that was evaluated last, or is now."""

    @property
    def running(self) -> bool:
        """Whether a version must stay active for an evaluation."""
        return self._task is not None and not self._task.done()

    def due(self, version: int, last: int) -> bool:
        """Whether a version is to be evaluated and was not; `last` is that of the end of the job."""
        interval = self._config.eval_interval
        if interval is None or not self._datasets or self._history.summary.get(_LAST_VERSION, -1) >= version:
            return False
        if version == 0:
            return not self._config.skip_eval_before_train
        return version % interval == 0 or version == last

    def begin(self, version: int) -> None:
        """Evaluate a version that is active or about to be."""
        evaluation = Evaluation(self._context.job_id, self._context.config, self._datasets, version, self._attempts)
        self.version = version
        self._dispatcher.evaluation = evaluation
        self._task = asyncio.create_task(self._evaluate(evaluation))
        self._dispatcher.pump()

    async def finish(self, check: Callable[[], None]) -> None:
        """Wait for a running evaluation; `check`, called about once a second, raises what ends the wait."""
        while self.running:
            assert self._task is not None
            check()
            self._dispatcher.pump()
            await asyncio.wait({self._task}, timeout=1.0)
        self.collect()

    def collect(self) -> None:
        """Raise what an evaluation has failed for, if it has; waits for nothing."""
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()

    async def cancel(self) -> None:
        """Give up a running evaluation."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._dispatcher.end_evaluation()

    def forget_after(self, version: int) -> None:
        """The job is back at a version: later ones will be other weights and are to be evaluated again."""
        if self._history.summary.get(_LAST_VERSION, -1) > version:
            self._history.summary[_LAST_VERSION] = version

    async def _evaluate(self, evaluation: Evaluation) -> None:
        try:
            metrics = await evaluation.wait()
        finally:
            self._attempts = max(self._attempts, evaluation.attempts)
        self._dispatcher.evaluation = None
        # Metrics of version v belong to step v - 1, whose training made it; those of the initial weights to step 0.
        await self._history.metrics(max(0, evaluation.version - 1), metrics)
        summary = self._history.summary
        results = summary.setdefault("eval", {})
        numbers = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.count("/") == 1}
        results["after"] = numbers
        if evaluation.version == 0:
            results["before"] = numbers
        summary[_LAST_VERSION] = evaluation.version
        await self._history.save()
