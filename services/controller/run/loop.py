"""The run loop of one job: load, publish, then generate, train and publish, step after step.

The loop of the first step and of a resumed run is the same: `_load` asks the trainer where it stands, publishes that
version, and rebuilds admission from the trainer's checkpoint and the sample queue. A lost trainer, weight-sync service
or Redis sends the loop back to `_load`; rollouts work on meanwhile.

With max_weight_staleness 0 each version is active before the next step begins. With more, the trainer goes on while
engines load what it published, and while a version is evaluated, which must stay active for as long: only the staleness
bound, through admission, makes it wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import controller_pb2, job_pb2, rollout_pb2, trainer_pb2
from miles.services.controller.artifacts.checkpoints import step_of
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.trainer import TrainerLink
from miles.services.controller.jobs import number_types
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.controls import JobControls, JobStoppedError
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.admission import Admission, Batch
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.run.evaluation_schedule import Evaluations
from miles.services.controller.run.lease_messages import training_lease
from miles.services.controller.run.publish import Publishing
from miles.services.controller.run.recovery import admission_after
from miles.services.controller.run.release import release_workers
from miles.services.controller.run.training import train_unless_ended
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.step_metrics import RESPONSE_TOKENS, StepTimes, step_metrics
from miles.services.controller.status.worker_activity import WorkerActivity
from miles.services.controller.workers.registry import WorkerRegistry
from miles.services.controller.workers.required_workers import RequiredWorkers

if TYPE_CHECKING:
    from miles.data import PromptSource
    from miles.queue import GroupQueue

logger = logging.getLogger(__name__)

_RECOVERY_PAUSE_S = 0.5
_MAX_RECOVERIES_WITHOUT_A_STEP = 8
_PAUSED, _LOADING, _INTERRUPTED = "paused by the user", "loading", "a batch is complete"
"""Why no training group is handed out."""


class RunLoop:
    """Drives one job from its newest checkpoint to its end."""

    def __init__(
        self,
        context: JobContext,
        history: JobHistory,
        controls: JobControls,
        registry: WorkerRegistry,
        queue: GroupQueue,
        prompts: PromptSource,
        eval_sets: Mapping[str, PromptSource],
    ) -> None:
        self._context = context
        self._config = context.config
        self._history = history
        self._controls = controls
        self._registry = registry
        self._queue = queue
        self._prompts = prompts
        self._eval_sets = eval_sets
        self._clock = ActivityClock(on_span=history.timeline.add)
        self._activity = WorkerActivity(history.timeline.add)
        self.status = RunStatus(self._activity)
        self._workers = RequiredWorkers(registry, controls, self.status)
        self._began = time.monotonic() - float(history.summary.get("wall_s", 0.0))
        self._loaded_before = False
        self._publication_due = False
        self._step = 0
        self._step_began = 0.0

    async def run(self) -> None:
        """Run until every step is done; raises what the user asked for or what went wrong for good."""
        await self._connect()
        dispatcher = self._dispatcher
        keep_links = asyncio.create_task(dispatcher.run())
        recoveries, recovered_at = 0, -1
        try:
            while True:
                try:
                    await self._attempt()
                    return
                except (WorkerLostError, *TRANSIENT) as error:
                    recoveries = recoveries + 1 if recovered_at == self._step else 1
                    recovered_at = self._step
                    if recoveries > _MAX_RECOVERIES_WITHOUT_A_STEP:
                        raise
                    await self._queue.wait_until_answering(deadlines.REDIS_S)
                    await self._history.state(job_pb2.JOB_STATE_RECOVERING, str(error))
                    self.status.enter("recovering", f"what was lost: {error}")
                    await self._publishing.cancel()
                    await self._evaluations.cancel()
                    await asyncio.sleep(_RECOVERY_PAUSE_S)
        finally:
            await self._publishing.cancel()
            await self._evaluations.cancel()
            dispatcher.admission = None
            links = list(dispatcher.links.values())
            keep_links.cancel()
            await asyncio.gather(keep_links, return_exceptions=True)
            self.status.enter("ending", "every worker to drop the job")
            await release_workers(self._context, self._registry, links, self._weightsync)
            self._activity.close()

    async def _connect(self) -> None:
        weightsync = (await self._workers.wait_for(controller_pb2.WORKER_KIND_WEIGHTSYNC))[0]
        self._weightsync = weightsync.registration.address
        if number_types.is_open(self._config):
            await self._choose_number_types()
        self._dispatcher = self.status.dispatcher = Dispatcher(
            self._context,
            self._registry,
            self._queue,
            self._clock,
            self._activity,
            self._make_lease,
            self._weightsync,
            await self._workers.reward_addresses(self._config.reward.reward_service),
        )
        self._publishing = self.status.publishing = Publishing(
            self._context, weightsync, self._dispatcher, self._clock, self._activity, on_active=self._on_active
        )
        self._evaluations = Evaluations(self._context, self._history, self._dispatcher, self._eval_sets)

    async def _choose_number_types(self) -> None:
        chosen = await number_types.choose(self._config, self._workers, self._history.summary)
        self._config = self._config.replace(train_dtype=chosen.train_dtype, rollout_dtype=chosen.rollout_dtype)
        self._context = dataclasses.replace(self._context, config=self._config)
        await self._history.save()
        await self._say(str(chosen))

    async def _attempt(self) -> None:
        """From loading to the end, as long as no worker the loop depends on is lost."""
        await self._workers.wait_for(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        worker = (await self._workers.wait_for(controller_pb2.WORKER_KIND_TRAINER))[0]
        trainer = TrainerLink(worker, self._context, self._weightsync)
        if warning := number_types.warning_of(worker, self._config.train.train_dtype):
            self._dispatcher.warnings.append(warning)
        try:
            await self._load(trainer)
            await self._history.state(job_pb2.JOB_STATE_RUNNING, f"at step {self._step}")
            await self._after_step(trainer)
            try:
                while self._step < self._last:
                    await self._take_step(trainer)
                await self._evaluations.finish(lambda: self._check(trainer))
                await self._publishing.settle()
            except JobStoppedError:
                await self._save(trainer, export_hf=False)
                await self._finish_evaluation(trainer)
                raise
            if self._step > 0:
                await self._save(trainer, export_hf=True)
        finally:
            await trainer.close()

    # -- loading ------------------------------------------------------------------------------------------------------

    async def _load(self, trainer: TrainerLink) -> None:
        """Bring the workers to the newest checkpoint's version and admission to where it stood."""
        self.status.enter("loading", "the trainer to load the model")
        with self._activity.during(trainer.worker_id, "load"):
            ready = await self._controls.unless_ended(trainer.start_job())
        self.status.enter("loading", "a rollout to load the model")
        while not self._dispatcher.connected():
            self._check(trainer)
            await self._dispatcher.wait_for_change()
        if self._publishing.active is not None and ready.step < self._publishing.newest:
            await self._drain(trainer)
        self._step = self._history.timeline.step = self.status.step = ready.step
        self.status.saved_step = self._saved_step(ready)
        self._history.open_metrics(self._step)
        await self._restore_metrics(trainer)
        self._evaluations.forget_after(self._step)
        if self._publishing.active != self._step:
            self._dispatcher.holds.add(_LOADING)
        self._dispatcher.holds.discard(_INTERRUPTED)
        self._dispatcher.admission = admission = await self._admit_again(ready)
        self._step_began = time.monotonic()
        self._publication_due = False
        self.status.enter("loading", f"engines to load version {self._step}")
        await self._publishing.export(trainer, self._step)
        await self._publishing.settle()
        if not self._loaded_before:  # time shares are those of the loop; loading models comes once
            self._clock.restart()
            self._loaded_before = True
        where = ready.checkpoint_dir or "the initial weights"
        await self._say(f"loaded {where} at step {ready.step}; {len(admission.ready)} groups in the queue")

    def _saved_step(self, ready: trainer_pb2.TrainerReady) -> int | None:
        """Steps of the newest checkpoint; a trainer that held the job has saved since it was loaded."""
        folders = (ready.checkpoint_dir, self._history.summary.get("checkpoint", ""))
        saved = [step for step in map(step_of, folders) if step is not None and step <= ready.step]
        return max(saved, default=None)

    async def _admit_again(self, ready: trainer_pb2.TrainerReady) -> Admission:
        await self._tell_of_given_up_groups()
        before = self._dispatcher.admission
        return await admission_after(
            ready,
            self._config,
            self._last,
            self._queue,
            self._registry.first_lease_number,
            before.leases if before is not None else {},
        )

    async def _drain(self, trainer: TrainerLink) -> None:
        """The trainer is back at older weights: let what runs finish with those it began with, or give it up."""
        admission = self._dispatcher.admission
        self._dispatcher.holds.add(_LOADING)
        for deadline_s, give_up in ((deadlines.DRAIN_S, False), (deadlines.GIVE_UP_S, True)):
            if give_up:
                self._dispatcher.interrupt()
            end = time.monotonic() + deadline_s
            while admission is not None and admission.leases and time.monotonic() < end:
                self._check(trainer)
                await self._dispatcher.wait_for_change()
        self._dispatcher.admission = None

    async def _restore_metrics(self, trainer: TrainerLink) -> None:
        """Record what the trainer still knows of steps whose metrics were lost with the controller."""
        recorded = self._history.recorded_steps(RESPONSE_TOKENS)
        for step in range(max([-1, *recorded]) + 1, self._step):
            # A trainer that came from a checkpoint answers for the last steps only; older ones stay unknown.
            with contextlib.suppress(WorkerFailedError):
                await self._history.metrics(step, (await trainer.train(step)).metrics)

    # -- steps --------------------------------------------------------------------------------------------------------

    async def _take_step(self, trainer: TrainerLink) -> None:
        """Wait for a batch, train on it, publish the result; then what is due after the step."""
        admission = self._dispatcher.admission
        assert admission is not None
        batch = await self._next_batch(trainer, admission)
        began = time.monotonic()
        if self._config.cluster.offload_rollout:
            await self._release_memory(trainer)
        self.status.enter("training")
        with self._clock.during("train"), self._activity.during(trainer.worker_id, "train"):
            done = await train_unless_ended(trainer, batch, self._step, self._controls, self.status)
        self._note_checkpoint(done.checkpoint_dir)
        trained = time.monotonic()
        admission.finish_step(batch)
        step, self._step = self._step, self._step + 1
        self._history.timeline.step = self.status.step = self._step
        try:
            await self._publish(trainer)
        finally:  # a step that was taken is on record also when its publication fails
            now = time.monotonic()
            times = StepTimes(began - self._step_began, trained - began, now - trained, now - self._step_began)
            self._step_began = now
            ranks = self._config.cluster.trainer_world_size
            await self._history.metrics(step, step_metrics(done.metrics, batch, len(admission.ready), times, ranks))
        await self._after_step(trainer)

    async def _release_memory(self, trainer: TrainerLink) -> None:
        """Have engines give way to the trainer until the next version; one that is lost holds nothing."""
        await self._evaluations.finish(lambda: self._check(trainer))
        outcomes = await asyncio.gather(
            *(link.release_memory() for link in self._dispatcher.connected()), return_exceptions=True
        )
        for error in outcomes:
            if error is not None and not isinstance(error, WorkerLostError):
                raise error

    async def _next_batch(self, trainer: TrainerLink, admission: Admission) -> Batch:
        while True:
            self._check(trainer)
            await self._hold_while_paused(trainer)
            self.status.enter("collecting")
            await self._publishing.collect()
            self._evaluations.collect()
            if self._publication_due and not self._evaluations.running:
                await self._publish(trainer)
            self._dispatcher.pump()
            await self._pass_on_warnings()
            await self._tell_of_given_up_groups()
            if (batch := admission.begin_step()) is not None:
                break
            await self._dispatcher.wait_for_change()
        if self._config.rollout.partial_rollout and self._publication_follows(self._step + 1):
            self._dispatcher.holds.add(_INTERRUPTED)
            self._dispatcher.interrupt()
        return batch

    def _publication_follows(self, step: int) -> bool:
        return step % self._config.weights.update_weights_interval == 0 or self._evaluations.due(step, self._last)

    async def _publish(self, trainer: TrainerLink) -> None:
        """Bring the trainer's weights to the engines, if they are due and no evaluation needs the ones before."""
        self._publication_due = self._publication_due or self._publication_follows(self._step)
        if not self._publication_due:
            return
        if self._synchronous or self._evaluations.due(self._step, self._last):
            with self.status.during("evaluating", "the evaluation of the version that engines serve"):
                await self._evaluations.finish(lambda: self._check(trainer))
        elif self._evaluations.running:
            return
        self.status.enter("publishing", f"engines to load version {self._step}")
        await self._publishing.export(trainer, self._step)
        self._publication_due = False
        if self._synchronous:
            await self._publishing.settle()

    def _on_active(self, version: int) -> None:
        admission = self._dispatcher.admission
        if admission is not None:
            admission.activate(version)
        self._dispatcher.holds -= {_LOADING, _INTERRUPTED}
        self._dispatcher.pump()
        self._dispatcher.notify()

    async def _after_step(self, trainer: TrainerLink) -> None:
        """What is due at a step, which may have been missed when the step was reached before."""
        save = self._config.checkpoint.save_interval
        if self._evaluations.due(self._step, self._last):
            self._evaluations.begin(self._step)
        due = save is not None and self._step > 0 and self._step % save == 0 and self._step < self._last
        await self._save_if_asked(trainer, due=due)
        self._history.job.policy_version = self._step
        self._summarise()
        await self._history.save()

    async def _save_if_asked(self, trainer: TrainerLink, *, due: bool = False) -> None:
        if self._controls.checkpoint or due:
            self._controls.checkpoint = False
            settings = self._config.checkpoint
            await self._save(trainer, export_hf=settings.save_hf is not None, in_background=settings.async_save)

    async def _save(self, trainer: TrainerLink, export_hf: bool, in_background: bool = False) -> None:
        saving = self.status.during("saving", "the checkpoint to be written")
        with saving, self._clock.during("train"), self._activity.during(trainer.worker_id, "save"):
            saved = await trainer.save(export_hf, in_background)
        self._note_checkpoint(saved.checkpoint_dir)
        if saved.hf_dir:
            self._history.summary["hf_checkpoint"] = saved.hf_dir
        self._summarise()
        await self._history.save()
        what = f"the checkpoint of step {saved.step} begun" if in_background else f"saved {saved.checkpoint_dir}"
        await self._say(f"{what} in {saved.save_s:.1f} s")

    def _note_checkpoint(self, folder: str) -> None:
        """The newest complete checkpoint is in this folder; empty when there is none."""
        if folder:
            self._history.summary["checkpoint"] = folder
            self.status.saved_step = step_of(folder)

    async def _finish_evaluation(self, trainer: TrainerLink) -> None:
        """Before a job stops: wait for the evaluation that runs, unless a resume repeats it."""
        if self._evaluations.running and self._evaluations.version != self._step:
            with self.status.during("evaluating", f"the evaluation of version {self._evaluations.version}"):
                await self._evaluations.finish(lambda: self._check(trainer, stopping=True))

    async def _hold_while_paused(self, trainer: TrainerLink) -> None:
        if not self._controls.paused:
            return
        self._dispatcher.holds.add(_PAUSED)
        await self._history.state(job_pb2.JOB_STATE_PAUSED, "paused by the user")
        self.status.enter("paused", "the user to resume the job")
        while await self._controls.wait_while_paused():
            await self._save_if_asked(trainer)
        self._dispatcher.holds.discard(_PAUSED)
        await self._history.state(job_pb2.JOB_STATE_RUNNING, "resumed by the user")

    # -- the rest -----------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> int:
        """Steps of the job in all, which is also its last version."""
        return int(self._history.job.num_rollout)

    @property
    def _synchronous(self) -> bool:
        return self._config.rollout.max_weight_staleness == 0

    def _check(self, trainer: TrainerLink, *, stopping: bool = False) -> None:
        """Raise whatever keeps the loop from going on; `stopping`: that the user asked to stop is known."""
        if self._controls.cancel or not stopping:
            self._controls.check()
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure
        if trainer.lost:
            raise WorkerLostError("the trainer's lease is over")

    async def _tell_of_given_up_groups(self) -> None:
        """Have the queue remember groups dropped for failing, as rollouts do for those that a filter drops."""
        while self._dispatcher.given_up:
            group_id, reason = next(iter(self._dispatcher.given_up.items()))
            await self._queue.drop(group_id, reason)
            del self._dispatcher.given_up[group_id]

    def _summarise(self) -> None:
        totals = self._clock.totals()
        summary = self._history.summary
        summary["steps"] = self._step
        summary["wall_s"] = round(time.monotonic() - self._began, 3)
        summary["time_share"] = {name: round(share, 4) for name, share in self._clock.shares().items()}
        if totals["generate"] > 0:
            summary["tokens_per_s"] = round(self._dispatcher.generated_tokens / totals["generate"], 1)

    async def _pass_on_warnings(self) -> None:
        warnings, self._dispatcher.warnings = self._dispatcher.warnings, []
        for warning in warnings:
            logger.warning("%s", warning)
            await self._history.log(job_pb2.LOG_LEVEL_WARNING, "controller", warning)

    async def _say(self, text: str) -> None:
        logger.info("%s", text)
        await self._history.log(job_pb2.LOG_LEVEL_INFO, "controller", text)

    def _make_lease(self, group_id: int, attempt: int, version: int) -> rollout_pb2.GroupLease:
        group = self._prompts.group(self._context.job_id, group_id, 1)
        return training_lease(self._config, group, attempt, version, max(version, self._publishing.newest))
