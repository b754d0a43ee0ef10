"""The loop of one job: admit, generate, train, publish, step after step, to the last step.

Rollouts generate whenever admission allows it, beside this loop (`dispatcher`). A new and a resumed run are the same
code: `resume.load` asks the trainer where it stands. When a worker that the loop depends on is lost, the loop ends and
`recovery` runs it again.

With max_weight_staleness 0 each version is active before the next step begins. With more, the trainer continues while
engines load what it published, and while a version is evaluated, which must stay active until then: only the staleness
bound, through admission, makes it wait.
"""

from __future__ import annotations

import asyncio
import time

from miles.rpc.gen import job_pb2
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.protocols import Trainer
from miles.services.controller.jobs.controls import JobStoppedError
from miles.services.controller.run.admission import Admission, Batch
from miles.services.controller.run.reach import watch_reach
from miles.services.controller.run.resume import load
from miles.services.controller.run.state import PAUSED, PREEMPTED, RunState
from miles.services.controller.run.train import train_unless_ended
from miles.services.controller.status.step_metrics import StepTimes, step_metrics
from miles.tasks import cancel
from miles.telemetry.tracing import span


class RunLoop:
    """Drives a job with one trainer, from its newest checkpoint to its end."""

    def __init__(self, run: RunState, trainer: Trainer) -> None:
        self._run = run
        self._config = run.config
        self._trainer = trainer
        self._reach: asyncio.Task[None] | None = None
        """Ends by an error when no engine can get the active version; None before the first is active."""

    async def run(self) -> None:
        """Take every step; raises what the user asked for, or what went wrong."""
        run = self._run
        admission = await load(run, self._trainer, self._check)
        run.drafts.loaded(run.step)
        await run.history.state(job_pb2.JOB_STATE_RUNNING, f"at step {run.step}")
        await self._after_step()
        if run.publisher.publishes:
            self._reach = asyncio.create_task(watch_reach(run.weightsync.worker, run.context.job_id))
        try:
            while run.step < run.last:
                await self._take_step(admission)
            await self._finish_all()
        except JobStoppedError:
            await self._save_before_stopping()
            raise
        finally:
            if self._reach is not None:
                await cancel(self._reach)
        if run.step > 0 and self._config.debug.has_trainer:
            if run.turns.exclusive:
                await run.turns.to_trainer(self._check)
            await run.checkpoints.save(self._trainer, export_hf=True)
        await run.traces.wait_until_written()

    async def _take_step(self, admission: Admission) -> None:
        """Wait for a batch, train on it, publish the result; then what is due after the step."""
        run = self._run
        batch = await self._next_batch(admission)
        await run.dump.write(run.step, batch.group_ids)
        began = time.monotonic()
        await run.turns.to_trainer(self._check)
        run.status.enter("training")
        with span("train call"), run.clock.during("train"), run.activities.during(self._trainer.worker_id, "train"):
            done = await train_unless_ended(self._trainer, batch, run.step, run.controls, run.status)
        run.checkpoints.note(done.checkpoint_dir)
        for warning in done.warnings:
            run.alerts.report(f"step {run.step}: {warning}")
        trained = time.monotonic()
        admission.finish_step(batch)
        step = run.step
        run.move_to(step + 1)
        if not self._config.debug.has_trainer:
            run.status.saved_step = run.step  # it is in the summary
        if run.turns.exclusive:  # later it would be the engines' turn
            await self._save_if_asked()
        try:
            await run.publications.publish_if_due(self._trainer, run.step, self._check)
        finally:  # a step that was taken is on record also when its publication fails
            now = time.monotonic()
            times = StepTimes(began - run.step_began, trained - began, now - trained, now - run.step_began)
            phases = {"collect": (run.step_began, began), "train": (began, trained), "publish": (trained, now)}
            run.step_began = now
            run.history.job.policy_version = run.step
            ranks = self._config.cluster.trainer_world_size
            metrics = {
                **step_metrics(done.metrics, batch, len(admission.ready), times, ranks, self._config.debug.has_trainer),
                **run.turns.take_metrics(),
                **run.drafts.take_metrics(),
                **self._finish_step_of_drafts(step),
            }
            if run.publisher.publishes:
                metrics["perf/update_weights_gb"] = run.publisher.newest_bytes / 1e9
            run.history.metrics_later(step, metrics)
            await run.traces.note(step, phases)
        with span("after step"):
            await self._after_step(save=not run.turns.exclusive)

    def _finish_step_of_drafts(self, step: int) -> dict[str, float]:
        """Tell people what a step's drafts were good for; return it as metrics."""
        run = self._run
        news = run.acceptance.finish_step(step)
        for warning in news.warnings:
            run.alerts.report(warning)
        for event in news.events:
            run.report.info_later(event)
        if by_versions := run.acceptance.by_versions():
            run.history.summary["acceptance"] = by_versions
        return news.metrics

    async def _next_batch(self, admission: Admission) -> Batch:
        run = self._run
        await run.turns.to_engines(self._trainer)
        while True:
            self._check()
            await self._wait_while_paused()
            run.status.enter("collecting")
            await run.publisher.check()
            run.evaluations.check()
            await run.history.check()
            await run.publications.publish_overdue(self._trainer, run.step, self._check)
            run.dispatcher.lease_groups()
            run.report.pass_on_warnings()
            await run.dispatcher.record_drops()
            if (batch := admission.begin_step()) is not None:
                break
            await run.dispatcher.wait_for_change()
        preempts = self._config.rollout.partial_rollout or run.turns.taken
        if preempts and run.publications.due(run.step + 1):
            run.dispatcher.hold(PREEMPTED)
            run.dispatcher.preempt()
        return batch

    async def _after_step(self, *, save: bool = True) -> None:
        """Do what is due at a step, which may have been missed when the step was reached before."""
        run = self._run
        if run.evaluations.due(run.step, run.last):
            run.evaluations.start(run.step)
        if save:
            await self._save_if_asked()
        run.history.job.policy_version = run.step
        run.report.save_summary_later(run.step, run.rollouts.generated_tokens)

    async def _save_if_asked(self) -> None:
        """Save a checkpoint if the user has asked for one or one is due."""
        run = self._run
        if run.checkpoints.asked(run.step, run.last):
            if run.turns.exclusive:
                await run.turns.to_trainer(self._check)
            await run.checkpoints.save_as_asked(self._trainer)

    async def _wait_while_paused(self) -> None:
        run = self._run
        if not run.controls.paused:
            return
        run.dispatcher.hold(PAUSED)
        await run.history.state(job_pb2.JOB_STATE_PAUSED, "paused by the user")
        run.status.enter("paused", "the user to resume the job")
        while await run.controls.wait_while_paused():
            await self._save_if_asked()
            await run.turns.to_engines(self._trainer)
        run.dispatcher.release_hold(PAUSED)
        await run.history.state(job_pb2.JOB_STATE_RUNNING, "resumed by the user")

    async def _finish_all(self) -> None:
        """After the last step, wait for what still runs: an evaluation, and engines that load the last version."""
        run = self._run
        if run.evaluations.running:
            with run.status.during("evaluating", f"the evaluation of version {run.evaluations.version}"):
                await run.evaluations.wait_until_done(self._check)
        run.evaluations.check()
        with run.status.during("publishing", f"engines to load version {run.step}"):
            await run.publisher.wait_until_active(self._check)
        run.report.pass_on_warnings()

    async def _save_before_stopping(self) -> None:
        run = self._run
        if not self._config.debug.has_trainer:
            return
        if not run.turns.exclusive:
            await run.checkpoints.save(self._trainer, export_hf=False)
            await self._finish_evaluation()
            return
        await self._finish_evaluation()  # it needs the engines, and the checkpoint the trainer
        await run.evaluations.cancel()
        await run.turns.to_trainer(lambda: self._check(stopping=True))
        await run.checkpoints.save(self._trainer, export_hf=False)

    async def _finish_evaluation(self) -> None:
        """Before a job stops, wait for a running evaluation, unless a resumed run repeats it."""
        run = self._run
        if run.evaluations.running and run.evaluations.version != run.step:
            with run.status.during("evaluating", f"the evaluation of version {run.evaluations.version}"):
                await run.evaluations.wait_until_done(lambda: self._check(stopping=True))

    def _check(self, *, stopping: bool = False) -> None:
        """Raise whatever ends the loop; `stopping`: the job is stopping already, as the user asked."""
        if self._run.controls.cancel or not stopping:
            self._run.controls.check()
        self._run.alerts.check()
        self._run.rollouts.check()
        if self._reach is not None and self._reach.done():
            self._reach.result()
        if self._trainer.lost:
            raise WorkerLostError("the trainer's worker lease has ended")
