"""Trains on a batch; when the user ends the job meanwhile, the step is abandoned if it has changed nothing yet."""

from __future__ import annotations

import asyncio
import contextlib

from miles.rpc.gen import trainer_pb2
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.protocols import Trainer
from miles.services.controller.clients.trainer import StepAbandonedError
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.run.admission import Batch
from miles.services.controller.status.run_status import RunStatus
from miles.tasks import cancelled_at_end


async def train_unless_ended(
    trainer: Trainer, batch: Batch, step: int, controls: JobControls, status: RunStatus
) -> trainer_pb2.TrainDone:
    """Take a training step on a batch.

    Raises as `JobControls.check` when the step was abandoned for the user: its groups are still queued.
    """
    training = asyncio.create_task(trainer.train(step, batch.group_ids, batch.dropped))
    ending = asyncio.create_task(controls.wait_for_end())
    try:
        async with cancelled_at_end(training, ending):
            await asyncio.wait({training, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not training.done():
                await _abandon(trainer, step, status)
            return await training
    except StepAbandonedError:
        controls.check()
        raise  # somebody else asked for it: the step has to be taken all the same


async def _abandon(trainer: Trainer, step: int, status: RunStatus) -> None:
    status.explain("the trainer to leave the step between two micro-batches")
    with contextlib.suppress(WorkerLostError):  # the call that trains raises what happened to the trainer
        if not await trainer.abandon(step):
            status.explain("the end of the step, of which an optimizer step was taken")
