"""Work that a user's request to end the job cuts short."""

from __future__ import annotations

import asyncio

import pytest

from miles.checkpoint_folder import step_of
from miles.rpc.gen import controller_pb2
from miles.services.controller.jobs.controls import JobCancelledError, JobControls, JobStoppedError


async def test_work_goes_on_to_its_end_when_nobody_ends_the_job() -> None:
    assert await JobControls().unless_ended(asyncio.sleep(0, "done")) == "done"


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (controller_pb2.JOB_ACTION_STOP, JobStoppedError),
        (controller_pb2.JOB_ACTION_CANCEL, JobCancelledError),
    ],
)
async def test_work_is_given_up_when_the_job_is_to_end(
    action: controller_pb2.JobAction.ValueType, error: type[Exception]
) -> None:
    controls = JobControls()
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    waiting = asyncio.create_task(controls.unless_ended(work()))
    await asyncio.sleep(0)
    controls.apply(controller_pb2.JOB_ACTION_PAUSE)
    await asyncio.sleep(0)
    assert not waiting.done()
    controls.apply(action)
    with pytest.raises(error):
        await waiting
    assert cancelled.is_set()


def test_a_checkpoint_is_known_by_the_name_of_its_folder() -> None:
    assert [step_of(name) for name in ("/run/checkpoints/step_00000012", "step_00000012.old", "nowhere", "")] == [
        12,
        None,
        None,
        None,
    ]
