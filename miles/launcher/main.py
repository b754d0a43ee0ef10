"""`train.py`: check the configuration, start everything, run the job, report, stop everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
import uuid
from collections.abc import Callable, Sequence

import grpc.aio
from rich.console import Console
from rich.logging import RichHandler

from miles.config import ConfigError, JobConfig
from miles.config.docs import help_text
from miles.config.dry_run import checked_config, describe_run
from miles.config.flags import parse_command_line
from miles.config.plan import tls_environment
from miles.launcher.attend import attend
from miles.launcher.chaos import Drill, drill_of, recovery_table
from miles.launcher.local import LocalCluster
from miles.launcher.process import ProcessGivenUpError
from miles.launcher.report import CURVE_NAME, plot_reward, print_summary
from miles.launcher.watch import RunView
from miles.rpc import ExitCode, ServiceExit, connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

logger = logging.getLogger(__name__)

_CONTROL_S = 30.0
_ENDED = {
    job_pb2.JOB_STATE_SUCCEEDED: ExitCode.OK,
    job_pb2.JOB_STATE_FAILED: ExitCode.JOB_FAILED,
    job_pb2.JOB_STATE_CANCELLED: ExitCode.JOB_CANCELLED,
    job_pb2.JOB_STATE_STOPPED: ExitCode.INTERRUPTED,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a training job on this machine from command-line flags; return the exit code."""
    console = Console(highlight=False)
    line = parse_command_line(sys.argv[1:] if arguments is None else arguments)
    if line.help:
        console.print(f"usage: train.py [--config FILE] [--dry-run] [FLAGS]\n\n{help_text()}", markup=False)
        return ExitCode.OK
    try:
        config = checked_config(line)
        if line.dry_run:
            console.print(describe_run(config), markup=False, soft_wrap=True)
            return ExitCode.OK
    except ConfigError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.BAD_CONFIG
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        return asyncio.run(_run(config, console))
    except ServiceExit as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return error.code
    except ProcessGivenUpError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.WORKER_FAILED


async def _run(config: JobConfig, console: Console) -> int:
    run_dir = pathlib.Path(config.services.run_dir)
    os.environ.update(tls_environment(config))
    interrupted = _catch_signals(console)
    async with LocalCluster(config) as cluster:
        page = f", web page {cluster.gateway_url}" if cluster.gateway_url else ""
        console.print(f"run folder {run_dir}, controller {cluster.controller_address}{page}", soft_wrap=True)
        drill = drill_of(config, cluster)
        job = await attend(_run_job(config, cluster, console, interrupted, drill), cluster, drill)
        console.print("stopping all processes")
    if drill is not None:
        console.print(recovery_table(drill.recoveries))
    return _report(job, run_dir, console)


async def _run_job(
    config: JobConfig, cluster: LocalCluster, console: Console, interrupted: asyncio.Event, drill: Drill | None
) -> job_pb2.Job:
    async with connect(cluster.controller_address) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        # One job a run folder: the same command again resumes it, or shows how it ended.
        request = controller_pb2.SubmitJobRequest(
            request_id=f"run:{config.services.name}", config_json=json.dumps(config.to_flat())
        )
        try:
            submitted = await stub.SubmitJob(request, wait_for_ready=True, timeout=60.0)
        except grpc.aio.AioRpcError as error:
            raise ServiceExit(ExitCode.CONTROLLER_UNREACHABLE, f"submitting the job: {error.details()}") from error
        job: job_pb2.Job = submitted.job
        if not submitted.created:
            console.print(f"job {job.job_id} is known in this run folder; going on with it")
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            return job
        stopping = asyncio.create_task(_stop_on_signal(stub, job.job_id, interrupted))
        try:
            with RunView(console) as view:

                def show(event: job_pb2.JobEvent, num_rollout: int) -> None:
                    view.show(event, num_rollout)
                    if drill is not None:
                        drill.on_event(event)

                return await watch_job(stub, job.job_id, not submitted.created, show)
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)


async def watch_job(
    stub: controller_pb2_grpc.ControllerServiceStub,
    job_id: str,
    only_new: bool,
    show: Callable[[job_pb2.JobEvent, int], None],
) -> job_pb2.Job:
    """Show the job's events until it has ended; goes on after the last one seen when the controller restarts.

    `show` gets an event and the job's number of steps.
    """
    request = controller_pb2.WatchJobRequest(job_id=job_id, only_new=only_new)
    while True:
        try:
            job = await _get(stub, job_id)
            async for response in stub.WatchJob(request, wait_for_ready=True):
                request = controller_pb2.WatchJobRequest(job_id=job_id, after_event_id=response.event.event_id)
                if not job.num_rollout:
                    job = await _get(stub, job_id)
                show(response.event, job.num_rollout)
            job = await _get(stub, job_id)
            if job.state in _ENDED:
                return job
        except grpc.aio.AioRpcError as error:
            logger.warning("the controller is away (%s); waiting for it", error.details())
            await asyncio.sleep(0.5)


async def _get(stub: controller_pb2_grpc.ControllerServiceStub, job_id: str) -> job_pb2.Job:
    response: controller_pb2.GetJobResponse = await stub.GetJob(
        controller_pb2.GetJobRequest(job_id=job_id), wait_for_ready=True
    )
    return response.job


def _catch_signals(console: Console) -> asyncio.Event:
    """The first Ctrl-C or SIGTERM sets the returned event; the second one ends everything at once."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    this_task = asyncio.current_task()
    assert this_task is not None

    def on_signal() -> None:
        if interrupted.is_set():
            this_task.cancel()
            return
        console.print("saving the state and stopping; once more to stop at once without saving", style="yellow")
        interrupted.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return interrupted


async def _stop_on_signal(
    stub: controller_pb2_grpc.ControllerServiceStub, job_id: str, interrupted: asyncio.Event
) -> None:
    await interrupted.wait()
    request = controller_pb2.ControlJobRequest(
        job_id=job_id, action=controller_pb2.JOB_ACTION_STOP, operation_id=uuid.uuid4().hex
    )
    # The job may have ended in between; the watcher sees that.
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stub.ControlJob(request, timeout=_CONTROL_S)


def _report(job: job_pb2.Job, run_dir: pathlib.Path, console: Console) -> ExitCode:
    code = _ENDED[job.state]
    if code is ExitCode.OK:
        plot_reward(run_dir / "metrics.jsonl", run_dir / CURVE_NAME)
        print_summary(console, json.loads(job.summary_json), run_dir)
    elif code is ExitCode.INTERRUPTED:
        console.print(f"stopped at step {job.policy_version}; the same command resumes the run in {run_dir}")
    else:
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        console.print(f"the job has {state}: {job.error}", style="red", markup=False, soft_wrap=True)
        console.print(f"logs: {run_dir / 'logs'}", soft_wrap=True)
    return code
