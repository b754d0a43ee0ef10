"""Stopping a job on a local cluster: asks the controller to, says what is waited for, and gives up at the limit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import NoReturn

import grpc.aio
from rich.console import Console

from miles.launcher.stopping.interrupts import Interrupts, end_at_once
from miles.launcher.stopping.rules import Moment, Stopping
from miles.rpc import ExitCode
from miles.rpc.gen import controller_pb2, controller_pb2_grpc

_LOOK_EVERY_S = 0.5
_ANSWER_S = 2.0


async def stop_run(
    stub: controller_pb2_grpc.ControllerServiceStub,
    job_id: str,
    limit_s: float,
    console: Console,
    interrupts: Interrupts,
) -> NoReturn:
    """Have the job saved and stopped; to be cancelled when it has ended. Ends the process when the limit passes."""
    stopping = Stopping(limit_s, time.monotonic())
    while True:
        text = stopping.look(time.monotonic(), await describe(stub, job_id))
        interrupts.last_words = f"stopped at once. {stopping.resume()}"
        if text:
            console.print(text, style="yellow", markup=False, soft_wrap=True)
        if stopping.gives_up:
            end_at_once(ExitCode.NOT_SAVED if stopping.loses_steps else ExitCode.INTERRUPTED, stopping.last_words())
        # Again each time: a controller that has started again has not heard of it.
        request = controller_pb2.ControlJobRequest(job_id=job_id, action=controller_pb2.JOB_ACTION_STOP)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.ControlJob(request, timeout=_ANSWER_S)
        await asyncio.sleep(_LOOK_EVERY_S)


async def describe(stub: controller_pb2_grpc.ControllerServiceStub, job_id: str) -> Moment | None:
    """The run as it is; None when the controller does not say."""
    try:
        run = await stub.DescribeRun(controller_pb2.DescribeRunRequest(job_id=job_id), timeout=_ANSWER_S)
    except grpc.aio.AioRpcError:
        return None
    return Moment(
        phase=run.phase,
        waiting_for=run.waiting_for,
        for_s=max(0.0, (time.time_ns() - run.since_unix_ns) / 1e9),
        step=run.step,
        saved_step=run.saved_step if run.HasField("saved_step") else None,
        save_limit_s=run.save_limit_s,
    )
