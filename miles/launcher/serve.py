"""`miles serve`: starts every service on this machine without a job; jobs are submitted over the REST API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from miles.config import ConfigError, JobConfig
from miles.config.checks.environment import deployment_faults
from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import wrapped
from miles.config.job import examine, resolved
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.launcher.cluster import LocalCluster
from miles.launcher.console import LogLines, RunConsole, help_width
from miles.launcher.drill.drill import drill_of, recovery_table
from miles.launcher.plan import tls_environment
from miles.launcher.program import print_error, run_program, warn_of_secrets, why_not_here
from miles.launcher.run_on_cluster import run_on_cluster
from miles.launcher.stopping.interrupts import Interrupts, cancel_this_task
from miles.ownership.owner_file import mark_services
from miles.rpc.exit_codes import ExitCode
from miles.standard_streams import outlive_readers

SECTIONS = ("services", "cluster", "gateway", "tls")
"""Sections whose settings belong to services rather than to a job."""
_OF_SERVICES = frozenset({"custom_rm_path", "group_rm", "train_env_vars"})
"""Settings of other sections that belong to services."""
_USAGE = (
    "usage: miles serve [--config FILE] [FLAGS]",
    "Starts Redis, the controller, rollouts, trainer, reward and weight-sync services and the gateway on this machine, "
    "and keeps them running until Ctrl-C. Submit jobs with `miles submit`, or over the REST API.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to stop
    outlive_readers()
    words = sys.argv[1:] if arguments is None else arguments
    console = RunConsole()
    if (problem := why_not_here()) is not None:
        print_error(console, problem)
        return ExitCode.BAD_CONFIG
    line = parse_command_line(words)
    if line.help:
        usage = "\n\n".join(wrapped(paragraph, help_width()) for paragraph in _USAGE)
        console.print(f"{usage}\n\n{_flags_text()}", markup=False)
        return ExitCode.OK
    try:
        config = service_config(line.flat, line.faults)
    except ConfigError as error:
        print_error(console, error)
        return ExitCode.BAD_CONFIG
    logging.basicConfig(level=logging.INFO, handlers=[LogLines(console)])
    warn_of_secrets(words)
    return run_program(_serve(config, console), console)


def service_config(flat: dict[str, Any], faults: Sequence[Fault] = ()) -> JobConfig:
    """Build a configuration of services, with placeholders for jobs' settings. Raises ConfigError with all faults."""
    known = catalog()
    found = list(faults)
    for key, value in flat.items():
        if key in known and known[key].section not in SECTIONS and key not in _OF_SERVICES:
            found.append(Fault(key, value, "a job decides that", "give it to `miles submit`, or run train.py"))
    given = {"name": "serve", **{key: value for key, value in flat.items() if key not in {f.field for f in found}}}
    settings = resolved(given)
    ranks = int(settings.get("actor_num_nodes") or 1) * int(settings["actor_num_gpus_per_node"])
    placeholders: dict[str, Any] = {
        "hf_checkpoint": "(each job's)",
        "prompt_data": "(each job's)",
        "num_rollout": 1,
        "rollout_batch_size": ranks,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 1,
        **({} if given.get("custom_rm_path") else {"rm_type": "exact_match", "label_key": "label"}),
    }
    complete = placeholders | settings
    examination = examine(complete)
    found += examination.faults
    found += deployment_faults(examination.settings)
    if found:
        raise ConfigError(found)
    return JobConfig.from_flat(complete)


async def _serve(config: JobConfig, console: Console) -> ExitCode:
    os.environ.update(tls_environment(config))
    stopping = asyncio.Event()
    with Interrupts(cancel_this_task(console)) as interrupts:
        await _serve_until(stopping, interrupts, config, console)
    return ExitCode.OK


async def _serve_until(stopping: asyncio.Event, interrupts: Interrupts, config: JobConfig, console: Console) -> None:
    async with LocalCluster(config, any_job=True) as cluster:
        mark_services(cluster.run_dir)
        where = f"web page and REST API {cluster.gateway_url}, " if cluster.gateway_url else ""
        console.print(f"{where}controller {cluster.controller_address}, folder {cluster.run_dir}", soft_wrap=True)
        interrupts.on_first = stopping.set
        drill = drill_of(config, cluster, with_job=False)
        await run_on_cluster(stopping.wait(), cluster, drill)
        if drill is not None:
            console.print(recovery_table(drill.recoveries))
        console.print(
            "stopping all processes; the next start in the same folder resumes running jobs from their newest "
            "checkpoints. Ctrl-C again kills the processes that are left",
            soft_wrap=True,
        )


def _flags_text() -> str:
    lines = []
    for entry in catalog().values():
        if entry.section in SECTIONS or entry.key in _OF_SERVICES:
            lines.append(f"  {entry.flag} {entry.metavar}".rstrip())
            lines.append(wrapped(entry.help, help_width(), indent=6))
    return "\n".join(lines)
