"""A training step of a run whose user may end it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib

from miles.rpc.gen import trainer_pb2
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.trainer import StepAbandonedError, TrainerLink
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.run.admission import Batch
from miles.services.controller.status.run_status import RunStatus


async def train_unless_ended(
    trainer: TrainerLink, batch: Batch, step: int, controls: JobControls, status: RunStatus
) -> trainer_pb2.TrainDone:
    """Train on a batch. When the user ends the job meanwhile, a step that has changed nothing is abandoned.

    Raises as `JobControls.check` when the step was abandoned: its groups are still queued.
    """
    training = asyncio.create_task(trainer.train(step, batch.group_ids, batch.dropped))
    ending = asyncio.create_task(controls.wait_for_end())
    try:
        await asyncio.wait({training, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            await _abandon(trainer, step, status)
        return await training
    except StepAbandonedError:
        controls.check()
        raise  # somebody else asked for it: the step is to be taken all the same
    finally:
        for task in (training, ending):
            task.cancel()
        await asyncio.gather(training, ending, return_exceptions=True)


async def _abandon(trainer: TrainerLink, step: int, status: RunStatus) -> None:
    status.explain("the trainer to leave the step between two micro-batches")
    with contextlib.suppress(WorkerLostError):  # what became of the trainer is for the call that trains to say
        if not await trainer.abandon(step):
            status.explain("the end of the step, of which an optimizer step was taken")
