"""`miles plan`: what starts where, and the memory that each GPU needs, by part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import wrapped
from miles.config.schema.faults import ConfigError
from miles.launcher import memory_command
from miles.launcher.console import RunConsole, help_width
from miles.launcher.dry_run import checked_plan
from miles.launcher.elsewhere import plan_elsewhere
from miles.launcher.memory_view import NO_MODEL, Estimate, estimate, groups, host_total, title, total, warnings
from miles.launcher.placement import placement_of
from miles.launcher.plan import ProcessPlan, controller_address, plan_run
from miles.launcher.program import print_error
from miles.launcher.run_plan import RunPlan
from miles.memory.amount import Part, When, peak, size
from miles.memory.disk import disk_part
from miles.memory.report import GpuLoad
from miles.placement.deal import Placement
from miles.rpc.exit_codes import ExitCode

_USAGE = (
    "usage: miles plan [--json] [--assume-gpus N,N,...] [--config FILE] [FLAGS]\n"
    "       miles plan memory --help, for the memory of a model by precision",
    "Takes train.py's flags and says which process starts on which node and GPUs, and what each takes of a GPU's "
    "memory, of the host's and of the disk, with the formula of each figure. Starts nothing, and needs no weights: a "
    "model's config.json will do.",
    "--assume-gpus 8,8 plans for two nodes of 8 GPUs instead of this machine; 8x80GB says their memory too, which is "
    "141GB otherwise.",
    f"The exit code is 0 when everything fits, {ExitCode.MACHINE_UNSUITABLE:d} when something does not, and "
    f"{ExitCode.BAD_CONFIG:d} for a configuration with faults. --json prints one JSON object.",
)


def main(arguments: Sequence[str]) -> int:
    """Plan and print; return the exit code."""
    if list(arguments[:1]) == ["memory"]:
        return memory_command.main(arguments[1:])
    words = [word for word in arguments if word != "--json"]
    line = parse_command_line(words, starts_nothing=True)
    console = RunConsole()
    if line.help:
        console.print("\n\n".join(wrapped(paragraph, help_width()) for paragraph in _USAGE), markup=False)
        return ExitCode.OK
    try:
        plan = checked_plan(line, only_planned=True)
    except ConfigError as error:
        print_error(console, error)
        return ExitCode.BAD_CONFIG
    found = estimate(plan)
    if len(words) < len(arguments):
        console.print(json.dumps(as_json(plan, found), ensure_ascii=False), markup=False)
    else:
        console.print("\n".join(as_text(plan, found)), markup=False)
    return ExitCode.OK if found is None or found.fits else ExitCode.MACHINE_UNSUITABLE


def as_text(plan: RunPlan, found: Estimate | None) -> list[str]:
    """Return the lines of a plan."""
    lines = ["processes:"]
    placement = placement_of(plan.config, plan.assumed)
    for process in _processes(plan, placement):
        lines.append(f"  node {process.node}  {process.name}{gpus_of(process.name, placement)}")
    if found is None:
        return [*lines, "", f"memory: {NO_MODEL}"]
    for group in groups(found.report):
        lines += ["", f"{title(group)}: {total(group[0])}"]
        for use in group[0].uses:
            lines += _parts(use.device, f"{use.process} " if len(group[0].uses) > 1 else "")
    for node in found.report.nodes:
        lines += ["", host_total(found, node), *_parts(node.parts)]
    lines += ["", "disk, until the run ends", *_parts([disk_part(found.run)])]
    lines += [""] + [f"warning: {text}" for text in warnings(found)]
    lines += [f"before it can run: {fault}" for fault in plan.missing]
    return lines if lines[-1] else lines[:-1]


def _processes(plan: RunPlan, placement: Placement | None) -> list[ProcessPlan]:
    elsewhere = plan_elsewhere(plan.config, controller_address(plan.config), placement)
    return [*plan_run(plan.config, placement), *elsewhere]


def gpus_of(name: str, placement: Placement | None) -> str:
    """Say which GPUs a process of a plan has, if any."""
    if placement is None:
        return ""
    places = placement.trainer if name.startswith("trainer") else ()
    if name.startswith("rollout-"):
        number = int(name.removeprefix("rollout-").partition(",")[0])
        places = placement.rollouts[number : number + 1]
    parts = [f"{gpu_span(place.gpus)} of node {place.node}" for place in places if place.gpus]
    return f"  {', '.join(parts)}" if parts else ""


def gpu_span(gpus: Sequence[int]) -> str:
    """Name consecutive GPUs."""
    return f"GPU {gpus[0]}" if len(gpus) == 1 else f"GPUs {gpus[0]} to {gpus[-1]}"


def as_json(plan: RunPlan, found: Estimate | None) -> dict[str, Any]:
    """Return a plan as a JSON object; sizes are bytes."""
    placement = placement_of(plan.config, plan.assumed)
    processes = _processes(plan, placement)
    document: dict[str, Any] = {
        "processes": [{"name": each.name, "kind": each.kind, "node": each.node} for each in processes],
        "placement": None if placement is None else dataclasses.asdict(placement),
        "before_it_can_run": [str(fault) for fault in plan.missing],
    }
    if found is None:
        return {**document, "fits": None, "gpus": [], "nodes": [], "warnings": [NO_MODEL]}
    return {
        **document,
        "fits": found.fits,
        "host_bytes": found.host_bytes,
        "least_host_bytes": found.least.bytes,
        "gpus": [_gpu(load) for load in found.report.gpus],
        "nodes": [
            {"node": node.node, "peak": node.peak, "parts": list(map(dataclasses.asdict, node.parts))}
            for node in found.report.nodes
        ],
        "disk": dataclasses.asdict(disk_part(found.run)),
        "warnings": warnings(found),
    }


def _gpu(load: GpuLoad) -> dict[str, Any]:
    return {
        "node": load.node,
        "gpu": load.gpu,
        "capacity": load.capacity,
        "peak": load.peak,
        "fits": load.fits,
        "processes": [
            {"name": use.process, "part": use.part, "parts": list(map(dataclasses.asdict, use.device))}
            for use in load.uses
        ],
    }


def _parts(parts: Sequence[Part], prefix: str = "") -> list[str]:
    width = max((len(prefix + part.name) for part in parts), default=0)
    lines = []
    for part in parts:
        when = "" if part.when is When.ALWAYS else f", while {part.when}"
        lines.append(f"  {prefix + part.name:<{width}}  {size(part.bytes):>10}  {part.formula}{when}")
    return lines if len(parts) < 2 else [*lines, f"  {'at most at once':<{width}}  {size(peak(parts)):>10}"]
