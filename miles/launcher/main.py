"""`train.py`: checks the configuration, starts every service, runs the job, prints the results, and stops them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from rich.console import Console

from miles.config import ConfigError, JobConfig
from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import help_text
from miles.launcher.cluster import LocalCluster
from miles.launcher.console import LogLines, RunConsole, help_width
from miles.launcher.drill.drill import Drill, drill_of, recovery_table
from miles.launcher.dry_run import checked_plan, describe_run
from miles.launcher.job_client import EXIT_CODES, JobClient
from miles.launcher.job_words import end_words, resumption
from miles.launcher.plan import tls_environment
from miles.launcher.program import print_error, run_program, warn_of_secrets, why_not_here
from miles.launcher.run_on_cluster import run_on_cluster
from miles.launcher.run_view import RunView
from miles.launcher.stopping.interrupts import Interrupts, cancel_this_task
from miles.launcher.stopping.stop_progress import RunSnapshot
from miles.launcher.stopping.stop_run import stop_run
from miles.launcher.summary import CURVE_NAME, plot_reward, print_summary
from miles.redis_url import without_password
from miles.rpc import ExitCode, ServiceExit, connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2
from miles.standard_streams import outlive_readers
from miles.tasks import cancelled_at_end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a training job on this machine from command-line flags; return the exit code."""
    outlive_readers()
    words = sys.argv[1:] if arguments is None else arguments
    console = RunConsole()
    if (problem := why_not_here()) is not None:
        print_error(console, problem)
        return ExitCode.BAD_CONFIG
    line = parse_command_line(words)
    if line.help:
        usage = "usage: train.py [--config FILE] [--dry-run [--assume-gpus N,N,...]] [FLAGS]"
        console.print(f"{usage}\n\n{help_text(help_width())}", markup=False, end="")
        return ExitCode.OK
    try:
        plan = checked_plan(line)
        if line.dry_run:
            console.print(describe_run(plan), markup=False, soft_wrap=True)
            return ExitCode.OK
        config = plan.config
    except ConfigError as error:
        print_error(console, error)
        return ExitCode.BAD_CONFIG
    logging.basicConfig(level=logging.INFO, handlers=[LogLines(console)])
    warn_of_secrets(words)
    return run_program(_run(config, console), console)


async def _run(config: JobConfig, console: Console) -> ExitCode:
    os.environ.update(tls_environment(config))
    with Interrupts(cancel_this_task(console)) as interrupts:
        return await _run_with_services(config, console, interrupts)
    console.print("stopped before the run began: there is nothing to save")
    return ExitCode.INTERRUPTED


async def _run_with_services(config: JobConfig, console: Console, interrupts: Interrupts) -> ExitCode:
    run_dir = pathlib.Path(config.services.run_dir)
    async with LocalCluster(config) as cluster:
        page = f", web page {cluster.gateway_url}" if cluster.gateway_url else ""
        console.print(f"run folder {run_dir}, controller {cluster.controller_address}{page}", soft_wrap=True)
        drill = drill_of(config, cluster)
        try:
            end = await run_on_cluster(_run_job(config, cluster, console, interrupts, drill), cluster, drill)
        finally:
            interrupts.on_first = lambda: console.print(
                "the run has ended; Ctrl-C again kills the processes that are left"
            )
            interrupts.last_words = "killed the processes that were left of a finished run"
        console.print("stopping all processes")
    if drill is not None:
        console.print(recovery_table(drill.recoveries))
    return _report(end, run_dir, console)


@dataclasses.dataclass(frozen=True, slots=True)
class _End:
    """How a run ended."""

    job: job_pb2.Job
    snapshot: RunSnapshot | None = None
    """State of a run that was stopped; None when it was not, or when the controller does not answer."""
    not_applied: Sequence[str] = ()
    """Settings that differ from those with which the job had ended before."""


REFUSALS = {
    grpc.StatusCode.ALREADY_EXISTS: ExitCode.RUN_DIR_BUSY,
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.BAD_CONFIG,
}
"""Exit codes for a job that the controller refuses."""


async def _run_job(
    config: JobConfig, cluster: LocalCluster, console: Console, interrupts: Interrupts, drill: Drill | None
) -> _End:
    async with connect(cluster.controller_address) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        # A run folder has one job: the same command again resumes it, or shows how it ended.
        request = controller_pb2.SubmitJobRequest(
            request_id=f"run:{config.services.name}", config_json=json.dumps(stored_settings(config))
        )
        try:
            submitted = await stub.SubmitJob(request, wait_for_ready=True, timeout=60.0)
        except grpc.aio.AioRpcError as error:
            code = REFUSALS.get(error.code(), ExitCode.CONTROLLER_UNREACHABLE)
            raise ServiceExit(code, f"submitting the job: {error.details()}") from error
        asked = asyncio.Event()
        interrupts.on_first = asked.set
        job: job_pb2.Job = submitted.job
        client = JobClient(stub, job.job_id)
        if (words := resumption(submitted)) is not None:
            console.print(words, markup=False, soft_wrap=True)
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            return _End(job, not_applied=list(submitted.changes))
        with RunView(console) as view:

            def show(event: job_pb2.JobEvent, num_rollout: int) -> None:
                view.show(event, num_rollout)
                if drill is not None:
                    drill.on_event(event)

            watching = asyncio.create_task(client.watch(not submitted.created, show))
            limit_s = config.services.stop_timeout
            stopping = asyncio.create_task(_stop_when_asked(asked, client, limit_s, console, interrupts))
            async with cancelled_at_end(watching, stopping):
                ended, _ = await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    job = task.result()
        stopped = job.state == job_pb2.JOB_STATE_STOPPED
        return _End(job, await client.describe_run() if stopped else None)


def stored_settings(config: JobConfig) -> dict[str, Any]:
    """Return the job's settings as they are stored and shown: the controller knows the password of Redis already."""
    flat = config.to_flat()
    url = flat["redis_url"]
    return {**flat, "redis_url": None if url is None else without_password(url)}


async def _stop_when_asked(
    asked: asyncio.Event, client: JobClient, limit_s: float, console: Console, interrupts: Interrupts
) -> NoReturn:
    await asked.wait()
    await stop_run(client, limit_s, console, interrupts)


def _report(end: _End, run_dir: pathlib.Path, console: Console) -> ExitCode:
    job = end.job
    code = EXIT_CODES[job.state]
    if end.not_applied:
        problem = f"the run in {run_dir} has taken all of its {job.policy_version} steps, with other settings"
        remedy = f"raise num_rollout above {job.policy_version} to go on with the new ones, or choose another name"
        console.print(f"{problem} ({', '.join(end.not_applied)}); {remedy}", style="red", markup=False, soft_wrap=True)
        return ExitCode.BAD_CONFIG
    if code is ExitCode.OK:
        plot_reward(run_dir / "metrics.jsonl", run_dir / CURVE_NAME)
        print_summary(console, json.loads(job.summary_json), run_dir)
    elif end.snapshot is not None and end.snapshot.lost:
        saved = f"step {end.snapshot.saved_step}" if end.snapshot.saved_step else "the beginning"
        problem = f"stopped at step {job.policy_version} without saving; the same command goes on from {saved}"
        console.print(f"{problem} in {run_dir}", style="red", soft_wrap=True)
        return ExitCode.NOT_SAVED
    elif code is ExitCode.INTERRUPTED:
        console.print(f"stopped at step {job.policy_version}; the same command resumes the run in {run_dir}")
    else:
        console.print(end_words(job), style="red", markup=False, soft_wrap=True)
        console.print(f"logs: {run_dir / 'logs'}", soft_wrap=True)
    return code
