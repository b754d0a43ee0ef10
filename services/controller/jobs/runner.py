"""Runs one job from its record to its end, and records how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import pathlib
import sys
import time
from collections.abc import AsyncIterator

import redis.asyncio

from miles import heap
from miles.config import ConfigError, JobConfig
from miles.config.eval_sets import eval_sets
from miles.data import DataError, PromptSource, eval_sources, parse_file_slice, train_source
from miles.data.template import load_tokenizer
from miles.ownership.claim import FolderBusyError, claimed
from miles.queue import GroupQueue
from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import job_pb2
from miles.services.controller.artifacts.log_spans import LogSpans
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.controls import JobCancelledError, JobControls, JobStoppedError
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.jobs.records import ENDED
from miles.services.controller.jobs.saved_steps import saved_step
from miles.services.controller.jobs.store import JobStore
from miles.services.controller.run.recovery import run_to_end
from miles.services.controller.run.release_workers import release_workers
from miles.services.controller.run.setup import RunSetup
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.tell_waits import log_end, tell_waits
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import WorkerRegistry
from miles.tasks import cancelled_at_end
from miles.telemetry.redaction import redact

logger = logging.getLogger(__name__)

_CLAIM_S = 60.0
"""How long a job waits for folders in which another controller still runs one."""
_CLAIM_AGAIN_S = 0.5


class JobRunner:
    """Prepares what a job needs, runs its loop, and records how it ended."""

    def __init__(
        self,
        store: JobStore,
        registry: WorkerRegistry,
        redis_client: redis.asyncio.Redis,
        redis_url: str,
        log_dir: pathlib.Path | None = None,
    ) -> None:
        """`log_dir` holds the logs of the services, if they outlive jobs."""
        self._store = store
        self._registry = registry
        self._redis = redis_client
        self._redis_url = redis_url
        self._log_dir = log_dir
        self.status: RunStatus | None = None
        """What the current run does; None while there is none."""

    async def run(self, job: job_pb2.Job, controls: JobControls) -> None:
        """Run the job until it has ended. Cancellation leaves the record as it is, so that the job can be resumed.

        Whatever is wrong with its record, its folders or its data ends this job alone.
        """
        try:
            config = JobConfig.from_flat(json.loads(job.config_json))
            context = JobContext(job.job_id, config, self._redis_url, pathlib.Path(config.services.run_dir))
            async with self._claimed(job, config, controls):
                await self._run_to_end(job, context, controls)
        except TRANSIENT:
            raise  # without Redis nothing can be recorded; the job is resumed once it is back
        except Exception as error:
            logger.exception("job %s failed", job.job_id)
            if job.state not in ENDED:
                await self._let_go(job.job_id)
                await self._end(job, *_early_end(error))

    @contextlib.asynccontextmanager
    async def _claimed(self, job: job_pb2.Job, config: JobConfig, controls: JobControls) -> AsyncIterator[None]:
        """Hold the job's folders; a controller that stops just now may need a while to give them back."""
        services, checkpoint = config.services, config.checkpoint
        end, told = time.monotonic() + _CLAIM_S, False
        with contextlib.ExitStack() as held:
            while True:
                claim = claimed(services.run_dir, checkpoint.save, checkpoint.save_hf, checkpoint.load, job.job_id)
                try:
                    await asyncio.to_thread(held.enter_context, claim)  # in a thread: a disk may hang
                    break
                except FolderBusyError as error:
                    if time.monotonic() > end:
                        raise
                    if not told:
                        told = True
                        logger.warning("job %s waits up to %g s: %s", job.job_id, _CLAIM_S, error)
                        await self._log(job, job_pb2.LOG_LEVEL_WARNING, f"waiting up to {_CLAIM_S:g} s: {error}")
                controls.check()
                await controls.changed.wait(_CLAIM_AGAIN_S)
            yield

    async def _let_go(self, job_id: str) -> None:
        """Free what a job has from an earlier life; it may be resumed. What fails here does not hide how it ended."""
        try:
            await release_workers(job_id, self._registry)
            await GroupQueue(self._redis, job_id, consumer="controller").retire()
        except TRANSIENT:
            raise
        except Exception:
            logger.exception("not all of what job %s has in use was freed", job_id)

    async def _run_to_end(self, job: job_pb2.Job, context: JobContext, controls: JobControls) -> None:
        history = JobHistory(self._store, job, context)
        spans = LogSpans(context.run_dir, self._log_dir or context.run_dir / "logs")
        await asyncio.to_thread(spans.begin)
        state, reason = job_pb2.JOB_STATE_SUCCEEDED, "every step is done"
        try:
            try:
                await self._run(context, history, controls)
            except Exception:  # why the job ends; what could not be recorded before must not take its place
                await history.settle()
                raise
            await history.finish()
        except JobStoppedError:
            state, reason = job_pb2.JOB_STATE_STOPPED, f"stopped by the user; {_saved(history)}"
        except JobCancelledError:
            state, reason = job_pb2.JOB_STATE_CANCELLED, "cancelled by the user"
        except (WorkerFailedError, WorkerLostError, DataError, ConfigError, TimeoutError) as error:
            logger.exception("job %s failed", job.job_id)
            state, reason = job_pb2.JOB_STATE_FAILED, str(error)
        except TRANSIENT:
            raise
        except Exception as error:
            logger.exception("job %s failed with an unexpected error", job.job_id)
            state, reason = job_pb2.JOB_STATE_FAILED, f"{type(error).__name__}: {error}"
        finally:
            history.close()
            await history.close_trackers()
        if state == job_pb2.JOB_STATE_FAILED:
            await history.log(job_pb2.LOG_LEVEL_ERROR, "controller", reason)
        try:
            await asyncio.to_thread(spans.end)
        except OSError as error:  # a job ends without its stretch of the logs, too
            logger.warning("the end of job %s in the logs is not known: %s", job.job_id, error)
        await history.state(state, reason)

    async def _end(self, job: job_pb2.Job, state: job_pb2.JobState.ValueType, reason: str) -> None:
        """Record the end of a job whose run folder or record cannot be used: in Redis alone."""
        job.state, job.ended_unix_ns = state, time.time_ns()
        if state == job_pb2.JOB_STATE_FAILED:
            job.error = redact(reason)
            await self._log(job, job_pb2.LOG_LEVEL_ERROR, reason)
        changed = job_pb2.JobStateChanged(state=job.state, reason=redact(reason))
        await self._store.put(job, job_pb2.JobEvent(job_id=job.job_id, state_changed=changed))

    async def _log(self, job: job_pb2.Job, level: job_pb2.LogLevel.ValueType, text: str) -> None:
        line = job_pb2.LogLine(level=level, source="controller", text=redact(text))
        await self._store.add_event(job_pb2.JobEvent(job_id=job.job_id, log=line))

    async def _run(self, context: JobContext, history: JobHistory, controls: JobControls) -> None:
        activities = WorkerActivities(history.timeline.add)
        status = RunStatus(activities, self._registry, _wanted_rollouts(context.config))
        self.status = status
        telling = asyncio.create_task(tell_waits(status, history, context.config.data.rollout_batch_size))
        telling.add_done_callback(log_end)
        try:
            async with cancelled_at_end(telling):
                await self._run_described(context, history, controls, activities, status)
        finally:
            self.status = None

    async def _run_described(
        self,
        context: JobContext,
        history: JobHistory,
        controls: JobControls,
        activities: WorkerActivities,
        status: RunStatus,
    ) -> None:
        queue = GroupQueue(self._redis, context.job_id, consumer="controller")
        try:
            try:
                await history.state(job_pb2.JOB_STATE_STARTING, "reading the data, loading models")
                await self._run_on_queue(queue, context, history, controls, activities, status)
            finally:
                if not isinstance(sys.exception(), TRANSIENT):  # else it goes on later from what its workers hold
                    status.enter("ending", "every worker to release the job")
                    await release_workers(context.job_id, self._registry)
        except JobCancelledError:
            await queue.drop_job()
            raise
        except TRANSIENT:
            raise
        except Exception:
            await queue.retire()  # it was stopped or failed, and may be resumed
            raise
        await queue.drop_job()

    async def _run_on_queue(
        self,
        queue: GroupQueue,
        context: JobContext,
        history: JobHistory,
        controls: JobControls,
        activities: WorkerActivities,
        status: RunStatus,
    ) -> None:
        prompts, eval_sets = await asyncio.to_thread(_read_data, context.config)
        for source in (*([prompts] if prompts is not None else []), *eval_sets.values()):
            if skipped := source.prompts.num_rows - len(source):
                text = f"{source.prompts.source}: {skipped} of {source.prompts.num_rows} prompts are too long, left out"
                await history.log(job_pb2.LOG_LEVEL_WARNING, "controller", text)
        num_rollout = context.config.rollouts(0 if prompts is None else len(prompts))
        if num_rollout == 0 and prompts is not None and context.config.data.num_rollout is None:
            raise DataError(
                f"num_epoch {context.config.data.num_epoch} over {len(prompts)} prompts does not fill one batch of "
                f"{context.config.data.rollout_batch_size}; lower rollout_batch_size or raise num_epoch"
            )
        # The number of steps fixes the learning-rate schedule, so every worker must know it.
        config = context.config.replace(num_rollout=num_rollout)
        data = {} if prompts is None else await asyncio.to_thread(prompts.identity)
        context = dataclasses.replace(context, config=config, data=data)
        history.job.num_rollout = num_rollout
        await history.save()
        await queue.reopen(self._registry.first_lease_number)
        setup = RunSetup(context, history, controls, self._registry, queue, prompts, eval_sets, activities, status)
        with heap.frozen():
            await run_to_end(setup)


def _early_end(error: Exception) -> tuple[job_pb2.JobState.ValueType, str]:
    """Return how a job has ended that could not begin, and why."""
    if isinstance(error, JobStoppedError):
        return job_pb2.JOB_STATE_STOPPED, "stopped by the user before it began"
    if isinstance(error, JobCancelledError):
        return job_pb2.JOB_STATE_CANCELLED, "cancelled by the user"
    return job_pb2.JOB_STATE_FAILED, str(error) if isinstance(error, OSError | ConfigError) else f"{error!r}"


def _saved(history: JobHistory) -> str:
    """Say how much of a stopped job is on disk."""
    steps, saved = history.job.policy_version, saved_step(history.summary) or 0
    return "the state is saved" if saved >= steps else f"a resume goes on from step {saved} of {steps}"


def _wanted_rollouts(config: JobConfig) -> int:
    return config.cluster.rollout_num_workers if config.debug.has_engines else 0


def _read_data(config: JobConfig) -> tuple[PromptSource | None, dict[str, PromptSource]]:
    """Read the prompts to train and to evaluate on; without engines there are none."""
    if not config.debug.has_engines:
        return None, {}
    assert config.rollout.hf_checkpoint is not None, "a rule requires it"
    for text in (config.data.prompt_data or "", *(each.path for each in eval_sets(config.to_flat()))):
        if not (path := parse_file_slice(text).path).is_file():  # before the seconds that a tokenizer takes
            raise DataError(f"{path}: there is no such file")
    tokenizer = load_tokenizer(config.rollout.hf_checkpoint, config.data.chat_template_path)
    sources = eval_sources(config, tokenizer)
    if config.data.prompt_data is None:  # a rule requires it unless the run only evaluates
        return next(iter(sources.values())), sources
    return train_source(config, tokenizer), sources
