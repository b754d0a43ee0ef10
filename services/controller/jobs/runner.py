"""Runs one job from its record to its end, and records how it ended."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pathlib

import redis.asyncio

from miles.config import ConfigError, JobConfig
from miles.data import DataError, PromptSource, eval_sources, train_source
from miles.data.template import load_tokenizer
from miles.queue import GroupQueue
from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import job_pb2
from miles.services.controller.artifacts.checkpoints import step_of
from miles.services.controller.artifacts.log_spans import LogSpans
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.controls import JobCancelledError, JobControls, JobStoppedError
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.jobs.reward_services import check_reward_services
from miles.services.controller.jobs.store import JobStore
from miles.services.controller.run.recovery import run_to_end
from miles.services.controller.run.setup import RunSetup
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.status.tell_waits import log_end, tell_waits
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import WorkerRegistry
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)


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
        """Run the job until it has ended. Cancellation leaves the record as it is, so that the job can be resumed."""
        config = JobConfig.from_flat(json.loads(job.config_json))
        context = JobContext(job.job_id, config, self._redis_url, pathlib.Path(config.services.run_dir))
        history = JobHistory(self._store, job, context)
        spans = LogSpans(context.run_dir, self._log_dir or context.run_dir / "logs")
        await asyncio.to_thread(spans.begin)
        state, reason = job_pb2.JOB_STATE_SUCCEEDED, "every step is done"
        try:
            await history.state(job_pb2.JOB_STATE_STARTING, "reading the data, loading models")
            await self._run(context, history, controls)
        except JobStoppedError:
            state, reason = job_pb2.JOB_STATE_STOPPED, f"stopped by the user; {_saved(history)}"
        except JobCancelledError:
            state, reason = job_pb2.JOB_STATE_CANCELLED, "cancelled by the user"
        except (WorkerFailedError, WorkerLostError, DataError, ConfigError, TimeoutError) as error:
            logger.exception("job %s failed", job.job_id)
            state, reason = job_pb2.JOB_STATE_FAILED, str(error)
        except TRANSIENT:
            raise  # without Redis nothing can be recorded; the job is resumed once it is back
        except Exception as error:
            logger.exception("job %s failed with an unexpected error", job.job_id)
            state, reason = job_pb2.JOB_STATE_FAILED, f"{type(error).__name__}: {error}"
        finally:
            history.close()
        if state == job_pb2.JOB_STATE_FAILED:
            await history.log(job_pb2.LOG_LEVEL_ERROR, "controller", reason)
        await asyncio.to_thread(spans.end)
        await history.state(state, reason)

    async def _run(self, context: JobContext, history: JobHistory, controls: JobControls) -> None:
        activities = WorkerActivities(history.timeline.add)
        status = RunStatus(activities, self._registry, context.config.cluster.rollout_num_workers)
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
        prompts, eval_sets = await asyncio.to_thread(_read_data, context.config)
        for source in (prompts, *eval_sets.values()):
            if skipped := source.prompts.num_rows - len(source):
                text = f"{source.prompts.source}: {skipped} of {source.prompts.num_rows} prompts are too long, left out"
                await history.log(job_pb2.LOG_LEVEL_WARNING, "controller", text)
        check_reward_services(context.config, (prompts, *eval_sets.values()))
        num_rollout = context.config.rollouts(len(prompts))
        if num_rollout == 0 and context.config.data.num_rollout is None:
            raise DataError(
                f"num_epoch {context.config.data.num_epoch} over {len(prompts)} prompts does not fill one batch of "
                f"{context.config.data.rollout_batch_size}; lower rollout_batch_size or raise num_epoch"
            )
        # The number of steps fixes the learning-rate schedule, so every worker must know it.
        context = dataclasses.replace(context, config=context.config.replace(num_rollout=num_rollout))
        history.job.num_rollout = num_rollout
        await history.save()
        queue = GroupQueue(self._redis, context.job_id, consumer="controller")
        try:
            setup = RunSetup(context, history, controls, self._registry, queue, prompts, eval_sets, activities, status)
            await run_to_end(setup)
        except JobCancelledError:
            await queue.drop_job()
            raise
        await queue.drop_job()


def _saved(history: JobHistory) -> str:
    """Say how much of a stopped job is on disk."""
    steps, saved = history.job.policy_version, step_of(history.summary.get("checkpoint", "")) or 0
    return "the state is saved" if saved >= steps else f"a resume goes on from step {saved} of {steps}"


def _read_data(config: JobConfig) -> tuple[PromptSource, dict[str, PromptSource]]:
    assert config.rollout.hf_checkpoint is not None, "a rule requires it"
    tokenizer = load_tokenizer(config.rollout.hf_checkpoint, config.data.chat_template_path)
    return train_source(config, tokenizer), eval_sources(config, tokenizer)
