"""The run loop of one job: load, publish, then generate, train and publish, step after step.

The loop of the first step and of a resumed run is the same: `_load` asks the trainer where it stands, publishes that
version, and rebuilds admission from the trainer's checkpoint and the sample queue. A lost trainer or weight-sync
service sends the loop back to `_load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from miles.rpc.gen import controller_pb2, job_pb2, rollout_pb2, trainer_pb2
from miles.services.controller import deadlines
from miles.services.controller.activity import ActivityClock
from miles.services.controller.admission import Admission
from miles.services.controller.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.dispatcher import Dispatcher
from miles.services.controller.evaluation import Evaluation
from miles.services.controller.group_leases import training_lease
from miles.services.controller.job_context import JobContext
from miles.services.controller.job_controls import JobControls, JobStoppedError
from miles.services.controller.job_history import JobHistory
from miles.services.controller.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.rollout_link import RolloutLink
from miles.services.controller.trainer_link import TrainerLink, activate, release_weights

if TYPE_CHECKING:
    from miles.data import PromptSource
    from miles.queue import GroupQueue

logger = logging.getLogger(__name__)

_RECOVERY_PAUSE_S = 1.0
_MAX_RECOVERIES_WITHOUT_A_STEP = 5


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
        self._began = time.monotonic() - float(history.summary.get("wall_s", 0.0))
        self._loaded_before = False
        self._evaluation: asyncio.Task[None] | None = None
        self._step = 0
        self._saved_step = -1
        self._step_began = 0.0

    async def run(self) -> None:
        """Run until every step is done; raises what the user asked for or what went wrong for good."""
        self._weightsync = (await self._require(controller_pb2.WORKER_KIND_WEIGHTSYNC))[0].registration.address
        dispatcher = Dispatcher(
            self._context,
            self._registry,
            self._clock,
            self._make_lease,
            self._weightsync,
            await self._reward_addresses(),
        )
        self._dispatcher = dispatcher
        keep_links = asyncio.create_task(dispatcher.run())
        recoveries, recovered_at = 0, -1
        try:
            while True:
                try:
                    await self._attempt()
                    return
                except WorkerLostError as error:
                    recoveries = recoveries + 1 if recovered_at == self._step else 1
                    recovered_at = self._step
                    if recoveries > _MAX_RECOVERIES_WITHOUT_A_STEP:
                        raise
                    await self._history.state(job_pb2.JOB_STATE_RECOVERING, str(error))
                    await self._drain()
                    await asyncio.sleep(_RECOVERY_PAUSE_S)
        finally:
            await self._end_evaluation()
            links = list(dispatcher.links.values())
            keep_links.cancel()
            await asyncio.gather(keep_links, return_exceptions=True)
            await self._release_workers(links)

    async def _attempt(self) -> None:
        """From loading to the end, as long as no worker the loop depends on is lost."""
        await self._require(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        worker = (await self._require(controller_pb2.WORKER_KIND_TRAINER))[0]
        trainer = TrainerLink(worker, self._context, self._weightsync)
        try:
            await self._load(trainer)
            await self._history.state(job_pb2.JOB_STATE_RUNNING, f"at step {self._step}")
            if self._step == 0 and not self._config.eval.skip_eval_before_train:
                self._begin_evaluation("before")
            try:
                while self._step < self._history.job.num_rollout:
                    await self._take_step(trainer)
                await self._finish_evaluation()
            except JobStoppedError:
                await self._finish_evaluation()
                await self._save(trainer, export_hf=False)
                raise
            if self._step > 0:
                await self._save(trainer, export_hf=True)
        finally:
            await trainer.close()

    async def _release_workers(self, links: Sequence[RolloutLink]) -> None:
        """Have every worker drop the job, however it ended, so that the next one finds them free."""
        for link in links:
            with contextlib.suppress(WorkerLostError, WorkerFailedError):
                await link.stop_job()
        for worker in self._registry.alive(controller_pb2.WORKER_KIND_TRAINER):
            trainer = TrainerLink(worker, self._context, self._weightsync)
            with contextlib.suppress(WorkerLostError, WorkerFailedError):
                await trainer.stop_job()
            await trainer.close()
        with contextlib.suppress(WorkerLostError, WorkerFailedError):
            await release_weights(self._context, self._weightsync)

    async def _load(self, trainer: TrainerLink) -> None:
        """Bring the workers to the newest checkpoint's version and admission to where it stood."""
        ready = await trainer.start_job()
        self._step = self._saved_step = self._history.timeline.step = ready.step
        while not self._dispatcher.ready_links():
            self._check(trainer)
            await self._dispatcher.wait_for_change()
        queued = {entry.group_id: entry.oldest_version for entry in await self._queue.outstanding()}
        admission = Admission.resume(
            batch_size=self._config.data.rollout_batch_size,
            max_staleness=self._config.rollout.max_weight_staleness,
            total_groups=self._config.data.rollout_batch_size * self._history.job.num_rollout,
            version=ready.step,
            consumed_below=ready.consumed_below,
            consumed_ids=ready.consumed_group_ids,
            ready=queued,
        )
        self._history.open_metrics(self._step)
        self._step_began = time.monotonic()
        await self._publish(trainer)
        self._dispatcher.admission = admission
        self._dispatcher.pump()
        if not self._loaded_before:  # time shares are those of the loop; loading models comes once
            self._clock.restart()
            self._loaded_before = True
        where = ready.checkpoint_dir or "the initial weights"
        await self._say(f"loaded {where} at step {ready.step}; {len(admission.ready)} groups in the queue")

    async def _take_step(self, trainer: TrainerLink) -> None:
        """Wait for a batch, train on it, publish the result; then what is due after the step."""
        admission = self._dispatcher.admission
        assert admission is not None
        batch = await self._next_batch(trainer, admission)
        waited_s = time.monotonic() - self._step_began
        staleness = admission.staleness(batch)
        with self._clock.during("train"):
            began = time.monotonic()
            done = await trainer.train(self._step, batch, admission.dropped)
            train_s = time.monotonic() - began
        admission.train(batch)
        step, self._step = self._step, self._step + 1
        self._history.timeline.step = self._step
        await self._finish_evaluation()
        update_s = await self._publish(trainer)
        admission.activate(self._step)
        self._dispatcher.pump()
        now = time.monotonic()
        step_s, self._step_began = now - self._step_began, now
        metrics = {
            **done.metrics,
            "rollout/fully_async/queue_size": len(admission.ready),
            "rollout/fully_async/avg_staleness": sum(staleness) / len(staleness),
            "rollout/fully_async/max_staleness": max(staleness),
            "perf/rollout_time": waited_s,
            "perf/train_wait_time": waited_s,
            "perf/actor_train_time": train_s,
            "perf/update_weights_time": update_s,
            "perf/step_time": step_s,
        }
        tokens_per_s = metrics["rollout/response_tokens"] / step_s
        metrics["perf/tokens_per_gpu_per_sec"] = tokens_per_s / self._config.cluster.trainer_world_size
        await self._history.metrics(step, metrics)
        await self._after_step(trainer)

    async def _after_step(self, trainer: TrainerLink) -> None:
        evaluate, save = self._config.eval.eval_interval, self._config.checkpoint.save_interval
        last = self._step == self._history.job.num_rollout
        if evaluate is not None and (self._step % evaluate == 0 or last):
            self._begin_evaluation("after" if last else "")
        if self._controls.checkpoint or (save is not None and self._step % save == 0 and not last):
            self._controls.checkpoint = False
            await self._save(trainer, export_hf=self._config.checkpoint.save_hf is not None)
        self._history.job.policy_version = self._step
        self._summarise()
        await self._history.save()

    async def _next_batch(self, trainer: TrainerLink, admission: Admission) -> list[int]:
        while True:
            self._check(trainer)
            await self._hold_while_paused()
            self._dispatcher.pump()
            await self._pass_on_warnings()
            if (batch := admission.next_batch()) is not None:
                return batch
            await self._dispatcher.wait_for_change()

    async def _hold_while_paused(self) -> None:
        if not self._controls.paused:
            return
        self._dispatcher.admitting = False
        await self._history.state(job_pb2.JOB_STATE_PAUSED, "paused by the user")
        await self._controls.wait_while_paused()
        self._dispatcher.admitting = True
        await self._history.state(job_pb2.JOB_STATE_RUNNING, "resumed by the user")

    def _check(self, trainer: TrainerLink) -> None:
        """Raise whatever keeps the loop from going on."""
        self._controls.check()
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure
        if trainer.lost:
            raise WorkerLostError("the trainer's lease is over")

    async def _publish(self, trainer: TrainerLink) -> float:
        """Make the trainer's weights the active version; return how long it took, in seconds."""
        began = time.monotonic()
        with self._clock.during("sync"):
            exported = await trainer.export(self._step)
            await activate(self._context, self._weightsync, self._step, len(self._dispatcher.ready_links()))
        logger.info("version %d is active (%d bytes)", self._step, exported.total_bytes)
        return time.monotonic() - began

    async def _save(self, trainer: TrainerLink, export_hf: bool) -> trainer_pb2.SaveCheckpointResponse:
        with self._clock.during("train"):
            saved = await trainer.save(export_hf)
        self._saved_step = saved.step
        self._history.summary["checkpoint"] = saved.checkpoint_dir
        if saved.hf_dir:
            self._history.summary["hf_checkpoint"] = saved.hf_dir
        self._summarise()
        await self._history.save()
        await self._say(f"saved {saved.checkpoint_dir} in {saved.save_s:.1f} s")
        return saved

    def _begin_evaluation(self, label: str) -> None:
        if self._config.eval.eval_interval is None or not self._eval_sets:
            return
        evaluation = Evaluation(self._context.job_id, self._config, self._eval_sets, self._step)
        self._dispatcher.evaluation = evaluation
        self._evaluation = asyncio.create_task(self._evaluate(evaluation, label))

    async def _evaluate(self, evaluation: Evaluation, label: str) -> None:
        self._dispatcher.pump()
        metrics = await evaluation.wait()
        self._dispatcher.evaluation = None
        # Metrics of version v belong to step v - 1, whose training made it; those of the initial weights to step 0.
        await self._history.metrics(max(0, evaluation.version - 1), metrics)
        results = self._history.summary.setdefault("eval", {})
        numbers = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.count("/") == 1}
        results["after"] = numbers
        if label == "before":
            results["before"] = numbers
        await self._history.save()

    async def _finish_evaluation(self) -> None:
        """Wait for a running evaluation: its version must stay active until its last response."""
        if self._evaluation is None:
            return
        while not self._evaluation.done():
            if self._controls.cancel:
                self._controls.check()
            if self._dispatcher.failure is not None:
                raise self._dispatcher.failure
            self._dispatcher.pump()
            await asyncio.wait({self._evaluation}, timeout=1.0)
        task, self._evaluation = self._evaluation, None
        task.result()

    async def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.cancel()
            await asyncio.gather(self._evaluation, return_exceptions=True)
            self._evaluation = None
        self._dispatcher.evaluation = None

    async def _drain(self) -> None:
        """Let running groups finish with the weights they began with, then forget them."""
        await self._end_evaluation()
        admission = self._dispatcher.admission
        self._dispatcher.admitting = False
        end = time.monotonic() + deadlines.DRAIN_S
        while admission is not None and admission.leases and time.monotonic() < end:
            self._controls.check()
            await self._dispatcher.wait_for_change()
        self._dispatcher.admission = None
        self._dispatcher.admitting = True

    def _summarise(self) -> None:
        totals = self._clock.totals()
        summary = self._history.summary
        summary["steps"] = self._step
        summary["wall_s"] = round(time.monotonic() - self._began, 3)
        summary["time_share"] = {name: round(share, 4) for name, share in self._clock.shares().items()}
        generated = sum(link.progress.generated_tokens for link in self._dispatcher.links.values())
        if totals["generate"] > 0:
            summary["tokens_per_s"] = round(generated / totals["generate"], 1)

    async def _pass_on_warnings(self) -> None:
        warnings, self._dispatcher.warnings = self._dispatcher.warnings, []
        for warning in warnings:
            logger.warning("%s", warning)
            await self._history.log(job_pb2.LOG_LEVEL_WARNING, "controller", warning)

    async def _say(self, text: str) -> None:
        logger.info("%s", text)
        await self._history.log(job_pb2.LOG_LEVEL_INFO, "controller", text)

    async def _require(self, kind: controller_pb2.WorkerKind.ValueType) -> list[AttachedWorker]:
        """Wait for a worker of a kind, unless the user ends the job first."""
        waiting = asyncio.create_task(self._registry.require(kind, 1, deadlines.WORKERS_ATTACH_S))
        while not waiting.done():
            try:
                self._controls.check()
            except Exception:
                waiting.cancel()
                raise
            await asyncio.wait({waiting}, timeout=0.5)
        return waiting.result()

    async def _reward_addresses(self) -> dict[str, str]:
        """Reward services by name: the user's own, and the built-in one as default unless the user named one so."""
        addresses = dict(service.split("=", 1) for service in self._config.reward.reward_service)
        if "default" not in addresses:
            worker = (await self._require(controller_pb2.WORKER_KIND_REWARD))[0]
            addresses["default"] = worker.registration.address
        return addresses

    def _make_lease(self, group_id: int, attempt: int, version: int) -> rollout_pb2.GroupLease:
        group = self._prompts.group(self._context.job_id, group_id, self._config.data.n_samples_per_prompt)
        return training_lease(self._config, group, attempt, version)
