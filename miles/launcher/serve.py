"""`miles serve`: every service on this machine, without a job; jobs come over the REST API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from miles.config import ConfigError, JobConfig
from miles.config.checks.environment import deployment_faults
from miles.config.command.flags import parse_command_line
from miles.config.job import examine, resolved
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.launcher.attend import attend
from miles.launcher.cluster import LocalCluster
from miles.launcher.drill.drill import drill_of, recovery_table
from miles.launcher.plan import tls_environment
from miles.launcher.process import ProcessGivenUpError
from miles.launcher.stopping.interrupts import Interrupts, cancel_this_task, leave_nothing_running
from miles.rpc.exit_codes import ExitCode, ServiceExit

SECTIONS = ("services", "cluster", "gateway", "tls")
"""Sections whose settings concern services rather than a job."""
_OF_SERVICES = frozenset({"custom_rm_path", "group_rm", "train_env_vars"})
"""Settings of other sections that do."""
_USAGE = """usage: miles serve [--config FILE] [FLAGS]

Starts Redis, the controller, rollouts, trainer, reward and weight-sync services and the gateway on this machine, and
keeps them running until Ctrl-C. Submit jobs with `miles submit`, or over the REST API."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to stop
    console = Console(highlight=False)
    line = parse_command_line(sys.argv[1:] if arguments is None else arguments)
    if line.help:
        console.print(f"{_USAGE}\n\n{_flags_text()}", markup=False)
        return ExitCode.OK
    try:
        config = service_config(line.flat, line.faults)
    except ConfigError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.BAD_CONFIG
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        asyncio.run(_serve(config, console))
    except ServiceExit as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return error.code
    except ProcessGivenUpError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.WORKER_FAILED
    finally:
        leave_nothing_running()
    return ExitCode.OK


def service_config(flat: dict[str, Any], faults: Sequence[Fault] = ()) -> JobConfig:
    """A configuration of services alone; what only a job decides has stand-ins. Raises ConfigError with every fault."""
    known = catalog()
    found = list(faults)
    for key, value in flat.items():
        if key in known and known[key].section not in SECTIONS and key not in _OF_SERVICES:
            found.append(Fault(key, value, "a job decides that", "give it to `miles submit`, or run train.py"))
    given = {"name": "serve", **{key: value for key, value in flat.items() if key not in {f.field for f in found}}}
    settings = resolved(given)
    ranks = int(settings.get("actor_num_nodes") or 1) * int(settings["actor_num_gpus_per_node"])
    stand_ins: dict[str, Any] = {
        "hf_checkpoint": "(each job's)",
        "prompt_data": "(each job's)",
        "num_rollout": 1,
        "rollout_batch_size": ranks,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 1,
        **({} if given.get("custom_rm_path") else {"rm_type": "exact_match"}),
    }
    complete = stand_ins | settings
    examination = examine(complete)
    found += examination.faults
    found += deployment_faults(examination.settings)
    if found:
        raise ConfigError(found)
    return JobConfig.from_flat(complete)


async def _serve(config: JobConfig, console: Console) -> None:
    os.environ.update(tls_environment(config))
    stopping = asyncio.Event()
    interrupts = Interrupts(cancel_this_task(console))
    try:
        await _serve_until(stopping, interrupts, config, console)
    except asyncio.CancelledError:
        if not interrupts.came:
            raise


async def _serve_until(stopping: asyncio.Event, interrupts: Interrupts, config: JobConfig, console: Console) -> None:
    async with LocalCluster(config, every_reward=config.reward.custom_rm_path is None) as cluster:
        where = f"web page and REST API {cluster.gateway_url}, " if cluster.gateway_url else ""
        console.print(f"{where}controller {cluster.controller_address}, folder {cluster.run_dir}", soft_wrap=True)
        interrupts.on_first = stopping.set
        drill = drill_of(config, cluster, with_job=False)
        await attend(stopping.wait(), cluster, drill)
        if drill is not None:
            console.print(recovery_table(drill.recoveries))
        console.print(
            "stopping all processes; the next start in the same folder takes up jobs that run from their newest "
            "checkpoints. Ctrl-C again kills what still runs",
            soft_wrap=True,
        )


def _flags_text() -> str:
    lines = []
    for entry in catalog().values():
        if entry.section in SECTIONS or entry.key in _OF_SERVICES:
            lines.append(f"  {entry.flag} {entry.metavar}".rstrip())
            lines.append(f"      {entry.help}")
    return "\n".join(lines)
