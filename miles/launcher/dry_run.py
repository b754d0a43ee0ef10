"""The dry run: checks a configuration and describes every process that would be started."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Collection, Sequence
from typing import Any

from miles.config.checks.environment import environment_faults
from miles.config.command.flags import CommandLine
from miles.config.command.yaml_files import write_text
from miles.config.job import JobConfig, examine, resolution
from miles.config.notes import notes
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import ConfigError, RunFault
from miles.launcher.elsewhere import command_line, plan_elsewhere
from miles.launcher.memory_view import memory_lines
from miles.launcher.placement import placement_of
from miles.launcher.plan import ProcessPlan, controller_address, plan_run
from miles.launcher.run_plan import RunPlan
from miles.precision.number_types import NumberTypes, decide, slow_type, slowdown_key
from miles.redis_url import without_password
from miles.telemetry.redaction import REDACTED, redact, redact_config


def checked_config(line: CommandLine) -> JobConfig:
    """Resolve the configuration for this machine and check it there. Raises ConfigError with every fault."""
    return checked_plan(line).config


def checked_plan(line: CommandLine, *, only_planned: bool = False) -> RunPlan:
    """Do the same for the cluster that is assumed, if one is.

    What only a run needs is no fault of one that is `only_planned`, or for an assumed cluster, but kept with the plan.
    """
    found = resolution(line.flat, None if line.assumed is None else "cuda")
    flat = found.flat
    examination = examine(flat)
    wrong = {fault.field for fault in examination.faults}
    here = [fault for fault in environment_faults(examination.settings, line.assumed) if fault.field not in wrong]
    tolerant = only_planned or line.assumed is not None
    missing = [fault for fault in here if tolerant and isinstance(fault, RunFault)]
    faults = line.merge([*examination.faults, *(fault for fault in here if fault not in missing)])
    if faults:
        raise ConfigError(faults)
    remarks = (*examination.notes, *notes(examination.settings))
    return RunPlan(JobConfig.from_flat(flat), line.assumed, tuple(missing), tuple(found.chosen), remarks)


def describe_run(plan: RunPlan) -> str:
    """Describe the run as YAML: every process with its command and environment, and the settings off their defaults.

    And what it takes of each GPU, and what is still missing for the run itself.
    """
    config = plan.config
    placement = placement_of(config, plan.assumed)
    plans = plan_run(config, placement)
    external = {f"reward service {name}": address for name, address in config.reward.service_addresses.items()}
    if config.services.redis_url is not None:
        external["redis"] = without_password(config.services.redis_url)
    document: dict[str, Any] = {
        "processes": [_described(plan, secret=config.train.train_env_vars) for plan in plans],
        "settings": _settings_read(plans),
        "other settings": "at their defaults; `miles config show` prints all",
        "number types": number_types_here(config) if plan.assumed is None else str(number_types_of(config)),
        "memory per GPU and what starts where": memory_lines(plan),
    }
    if plan.chosen:
        document["chosen here"] = list(plan.chosen)
    if plan.notes:
        document["accepted with a note"] = [str(note) for note in plan.notes]
    if plan.missing:
        document["before it can run"] = [str(fault) for fault in plan.missing]
    if external:
        document["runs elsewhere"] = external
    if elsewhere := plan_elsewhere(config, controller_address(config), placement):
        secret = config.train.train_env_vars
        document["start on other hosts"] = {plan.name: command_line(plan, secret) for plan in elsewhere}
    return redact(write_text(document))


def number_types_of(config: JobConfig) -> NumberTypes:
    """Return the number types of trainer and engines where both are fast in bfloat16, as on GPUs."""
    return decide(config.train.train_dtype, config.rollout.rollout_dtype, {})


def number_types_here(config: JobConfig) -> str:
    """Describe the number types of trainer and engines if both ran on this machine, with a warning of slow types.

    Imports PyTorch and times a matrix product, unless both types are float32 anyway.
    """
    asked = config.train.train_dtype, config.rollout.rollout_dtype
    types = number_types_of(config)
    if types.train_dtype == types.rollout_dtype == "float32":
        return str(types)
    if importlib.util.find_spec("torch") is None:  # an installation for the controller alone
        return "decided when the run starts, by what its workers are fast in"
    from miles.precision.speed import worker_speed

    speed = worker_speed(config.services.device)
    types = decide(*asked, {"this machine": speed.get(slowdown_key("bfloat16"))})
    warnings = (
        slow_type("this machine", dtype, speed.get(slowdown_key(dtype)))
        for dtype in dict.fromkeys((types.train_dtype, types.rollout_dtype))
    )
    return "; ".join([str(types), *filter(None, warnings)])


def _described(plan: ProcessPlan, secret: Collection[str]) -> dict[str, Any]:
    """Describe a process without the secrets in its command and environment; `secret` names variables."""
    described: dict[str, Any] = {"name": plan.name, "command": redact(shlex.join(plan.command))}
    if plan.node:
        described["node"] = f"{plan.node}, which is not the launcher's"
    if plan.environment:
        shown = redact_config(plan.environment)
        described["environment"] = {name: REDACTED if name in secret else value for name, value in shown.items()}
    return described


def _settings_read(plans: Sequence[ProcessPlan]) -> dict[str, Any]:
    """Return what the processes read, given or derived, as far as it is not the default."""
    read = {key: value for plan in plans for key, value in plan.config.items()}
    settings = {}
    for key, entry in catalog().items():
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        if key in read and read[key] not in (None, default):
            settings[key] = read[key]
    return redact_config(settings)
