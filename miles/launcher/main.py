"""`train.py`: check the configuration, start everything, run the job, report, stop everything."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import grpc.aio
from rich.console import Console
from rich.logging import RichHandler

from miles.config import ConfigError, JobConfig
from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import help_text
from miles.launcher.attend import attend
from miles.launcher.cluster import LocalCluster
from miles.launcher.drill.drill import Drill, drill_of, recovery_table
from miles.launcher.dry_run import checked_config, describe_run
from miles.launcher.plan import tls_environment
from miles.launcher.process import ProcessGivenUpError
from miles.launcher.report import CURVE_NAME, plot_reward, print_summary
from miles.launcher.stopping.interrupts import Interrupts, cancel_this_task, leave_nothing_running
from miles.launcher.stopping.rules import Moment
from miles.launcher.stopping.stop_run import describe, stop_run
from miles.launcher.watch import RunView
from miles.rpc import ExitCode, ServiceExit, connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

logger = logging.getLogger(__name__)

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
    finally:
        leave_nothing_running()


async def _run(config: JobConfig, console: Console) -> int:
    os.environ.update(tls_environment(config))
    interrupts = Interrupts(cancel_this_task(console))
    try:
        return await _run_on_cluster(config, console, interrupts)
    except asyncio.CancelledError:
        if not interrupts.came:
            raise
        console.print("stopped before the run began: there is nothing to save")
        return ExitCode.INTERRUPTED


async def _run_on_cluster(config: JobConfig, console: Console, interrupts: Interrupts) -> int:
    run_dir = pathlib.Path(config.services.run_dir)
    async with LocalCluster(config) as cluster:
        page = f", web page {cluster.gateway_url}" if cluster.gateway_url else ""
        console.print(f"run folder {run_dir}, controller {cluster.controller_address}{page}", soft_wrap=True)
        drill = drill_of(config, cluster)
        try:
            end = await attend(_run_job(config, cluster, console, interrupts, drill), cluster, drill)
        finally:
            interrupts.on_first = lambda: console.print("the run has ended; Ctrl-C again kills what still runs of it")
            interrupts.last_words = "killed what was left of a run that had ended"
        console.print("stopping all processes")
    if drill is not None:
        console.print(recovery_table(drill.recoveries))
    return _report(end, run_dir, console)


@dataclasses.dataclass(frozen=True, slots=True)
class _End:
    """How a run ended."""

    job: job_pb2.Job
    moment: Moment | None = None
    """What the controller says of a run that was stopped, if it does."""


async def _run_job(
    config: JobConfig, cluster: LocalCluster, console: Console, interrupts: Interrupts, drill: Drill | None
) -> _End:
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
        asked = asyncio.Event()
        interrupts.on_first = asked.set
        job: job_pb2.Job = submitted.job
        if not submitted.created:
            console.print(f"job {job.job_id} is known in this run folder; going on with it")
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            return _End(job)
        with RunView(console) as view:

            def show(event: job_pb2.JobEvent, num_rollout: int) -> None:
                view.show(event, num_rollout)
                if drill is not None:
                    drill.on_event(event)

            watching = asyncio.create_task(watch_job(stub, job.job_id, not submitted.created, show))
            limit_s = config.services.stop_timeout
            stopping = asyncio.create_task(_stop_when_asked(asked, stub, job.job_id, limit_s, console, interrupts))
            try:
                ended, _ = await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    job = task.result()
            finally:
                watching.cancel()
                stopping.cancel()
                await asyncio.gather(watching, stopping, return_exceptions=True)
        stopped = job.state == job_pb2.JOB_STATE_STOPPED
        return _End(job, await describe(stub, job.job_id) if stopped else None)


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


async def _stop_when_asked(
    asked: asyncio.Event,
    stub: controller_pb2_grpc.ControllerServiceStub,
    job_id: str,
    limit_s: float,
    console: Console,
    interrupts: Interrupts,
) -> NoReturn:
    await asked.wait()
    await stop_run(stub, job_id, limit_s, console, interrupts)


def _report(end: _End, run_dir: pathlib.Path, console: Console) -> ExitCode:
    job = end.job
    code = _ENDED[job.state]
    if code is ExitCode.OK:
        plot_reward(run_dir / "metrics.jsonl", run_dir / CURVE_NAME)
        print_summary(console, json.loads(job.summary_json), run_dir)
    elif end.moment is not None and end.moment.lost:
        saved = f"step {end.moment.saved_step}" if end.moment.saved_step else "the beginning"
        problem = f"stopped at step {job.policy_version} without saving; the same command goes on from {saved}"
        console.print(f"{problem} in {run_dir}", style="red", soft_wrap=True)
        return ExitCode.NOT_SAVED
    elif code is ExitCode.INTERRUPTED:
        console.print(f"stopped at step {job.policy_version}; the same command resumes the run in {run_dir}")
    else:
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        console.print(f"the job has {state}: {job.error}", style="red", markup=False, soft_wrap=True)
        console.print(f"logs: {run_dir / 'logs'}", soft_wrap=True)
    return code
