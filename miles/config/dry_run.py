"""Prints a plan in place of carrying it out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from miles.config.environment import environment_faults
from miles.config.faults import ConfigError
from miles.config.flags import CommandLine
from miles.config.job import JobConfig, examine, resolved
from miles.config.plan import ProcessPlan, plan_run


def checked_config(line: CommandLine) -> JobConfig:
    """The configuration, resolved for this machine and checked on it. Raises ConfigError with every fault at once."""
    flat = resolved(line.flat)
    examination = examine(flat)
    faults = line.merge([*examination.faults, *environment_faults(examination.settings)])
    if faults:
        raise ConfigError(faults)
    return JobConfig.from_flat(flat)


def describe_run(config: JobConfig) -> str:
    """Every process of the run as a YAML list: name, command, environment, settings."""
    plans = plan_run(config)
    external = {f"reward service {name}": address for name, address in config.reward.service_addresses.items()}
    if config.services.redis_url is not None:
        external["redis"] = config.services.redis_url
    document: dict[str, Any] = {"processes": [_described(plan, plans) for plan in plans]}
    if external:
        document["runs elsewhere"] = external
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def _described(plan: ProcessPlan, plans: Sequence[ProcessPlan]) -> dict[str, Any]:
    described: dict[str, Any] = {"name": plan.name, "command": shlex.join(plan.command)}
    if plan.environment:
        described["environment"] = dict(plan.environment)
    first = next(other for other in plans if other.config == plan.config)
    if plan.config:
        described["config"] = dict(plan.config) if first is plan else f"as {first.name}"
    return described
