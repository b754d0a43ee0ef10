"""Runs a job to its end: runs the loop again when a worker is lost.

A lost trainer, weight-sync service or Redis sends the loop back to loading (`resume`); rollouts work on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.protocols import Trainer
from miles.services.controller.clients.trainer import TrainerClient
from miles.services.controller.jobs import number_types
from miles.services.controller.run.loop import RunLoop
from miles.services.controller.run.no_trainer import NoTrainer
from miles.services.controller.run.setup import RunSetup
from miles.services.controller.run.state import RunState
from miles.tasks import cancel

_RECOVERY_PAUSE_S = 0.5
_MAX_RECOVERIES_WITHOUT_A_STEP = 8


async def run_to_end(setup: RunSetup) -> None:
    """Run until every step is done; raises what the user asked for, or what went wrong for good."""
    run = await setup.connect()
    dispatching = asyncio.create_task(run.dispatcher.run())
    run.alerts.watch(dispatching)
    run.drafts.begin()
    try:
        await _run_with_recoveries(run)
    finally:
        await run.publisher.cancel()
        await run.drafts.close()
        await run.evaluations.cancel()
        run.dispatcher.stop_admitting()
        await cancel(dispatching)
        run.weightsync.close()
        run.activities.close()


async def _run_with_recoveries(run: RunState) -> None:
    recoveries, recovered_at = 0, -1
    while True:
        try:
            return await _run_once(run)
        except (WorkerLostError, *TRANSIENT) as error:
            recoveries = recoveries + 1 if recovered_at == run.step else 1
            recovered_at = run.step
            if recoveries > _MAX_RECOVERIES_WITHOUT_A_STEP:
                tries = f"tried {recoveries} times from step {run.step}, without coming to the next one"
                raise WorkerLostError(f"{error} ({tries})") from error
            await _recover(run, error)


async def _run_once(run: RunState) -> None:
    """From loading to the end, unless a worker that the loop depends on is lost."""
    await run.workers.wait_for(controller_pb2.WORKER_KIND_WEIGHTSYNC)
    async with contextlib.aclosing(await _trainer(run)) as trainer:
        run.status.trainer = trainer
        try:
            await RunLoop(run, trainer).run()
        finally:
            run.status.trainer = None


async def _trainer(run: RunState) -> Trainer:
    """Wait for the trainer, unless the run has none."""
    if not run.config.debug.has_trainer:
        return NoTrainer(run.queue, run.history, run.config)
    worker = await run.workers.trainer(run.config.cluster.actor_num_nodes)
    run.turns.meet(worker)
    if warning := number_types.warning_of(worker, run.config.train.train_dtype):
        run.alerts.warn(warning)
    return TrainerClient(worker, run.context, run.weightsync.address)


async def _recover(run: RunState, error: Exception) -> None:
    run.status.enter("recovering", f"Redis to answer, after {error}")
    await run.queue.wait_until_answering(deadlines.REDIS_S)
    await run.history.state(job_pb2.JOB_STATE_RECOVERING, str(error))
    run.status.enter("recovering", f"what was lost: {error}")
    await run.publisher.cancel()
    await run.evaluations.cancel()
    await asyncio.sleep(_RECOVERY_PAUSE_S)
