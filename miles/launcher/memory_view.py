"""The estimates of memory as people read them: one line for GPUs with equal loads, and what does not fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from miles.launcher.machine import cluster_here, host_bytes
from miles.launcher.placement import placement_of, settings_of
from miles.launcher.run_plan import RunPlan
from miles.memory.amount import Part, peak, size
from miles.memory.least import least_host_memory
from miles.memory.remedy import fitting_layout, smallest_server
from miles.memory.report import GpuLoad, NodeLoad, Report, report_of
from miles.memory.run import Run, run_of
from miles.placement.nodes import Cluster

NO_MODEL = (
    "not estimated: config.json does not say the model's sizes, and there are no weights to count, or "
    "te_precision_config_file is at fault"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The estimates of a run, and the machines that they are for."""

    run: Run
    cluster: Cluster
    report: Report
    host_bytes: int | None
    """Host memory of the first node; None when it is not known."""

    @property
    def least(self) -> Part:
        """What that node needs at least, whatever the lengths of samples."""
        return least_host_memory(self.run)

    @property
    def fits(self) -> bool:
        """Whether GPUs hold their shares, and the first node's memory the least."""
        return self.report.fits and (self.host_bytes is None or self.least.bytes <= self.host_bytes)


def estimate(plan: RunPlan) -> Estimate | None:
    """Return the estimates of a plan; None when nothing is known of the model."""
    run = run_of(settings_of(plan.config))
    if run is None:
        return None
    on_gpus, nodes = plan.config.services.device == "cuda", plan.config.cluster.actor_num_nodes
    cluster = plan.assumed or (cluster_here(nodes) if on_gpus else Cluster(()))
    host = None if plan.assumed is not None else host_bytes()
    return Estimate(run, cluster, report_of(run, cluster, placement_of(plan.config, plan.assumed)), host)


def memory_lines(plan: RunPlan) -> list[str]:
    """Return a line for each group of equal GPUs, one for each node's memory, and warnings."""
    found = estimate(plan)
    if found is None:
        return [NO_MODEL]
    lines = [f"{title(group)}: {total(group[0])}" for group in groups(found.report)]
    lines += [host_total(found, node) for node in found.report.nodes]
    return [*lines, *warnings(found), "`miles plan` with the same flags shows each part with its formula"]


def groups(report: Report) -> list[list[GpuLoad]]:
    """Return neighbouring GPUs of a node with the same on them together."""
    return [list(group) for _, group in itertools.groupby(report.gpus, key=_kind)]


def title(group: Sequence[GpuLoad]) -> str:
    """Name GPUs and what is on them."""
    first = group[0]
    whats = []
    for number, use in enumerate(first.uses):
        parts = [load.uses[number].part for load in group]
        whats.append(f"{use.process} {span(parts)}")
    return f"node {first.node}, {gpu_numbers(group)}: {', '.join(whats)}"


def gpu_numbers(group: Sequence[GpuLoad]) -> str:
    """Name GPUs by their numbers."""
    first, last = group[0].gpu, group[-1].gpu
    return f"GPU {first}" if len(group) == 1 else f"GPUs {first} to {last}"


def span(parts: Sequence[str]) -> str:
    """Shorten `rank 0`, `rank 1`, … to the first and the last."""
    names = list(dict.fromkeys(parts))
    if len(names) == 1:
        return names[0]
    word, _, first = names[0].rpartition(" ")
    return f"{word}s {first} to {names[-1].rpartition(' ')[2]}"


def total(load: GpuLoad) -> str:
    """Say how much of a GPU's memory is taken."""
    if load.capacity is None:
        return f"about {size(load.peak)}"
    verdict = "" if load.fits and not load.tight else ", little is left" if load.fits else ", DOES NOT FIT"
    return f"about {size(load.peak)} of {size(load.capacity)}{verdict}"


def warnings(found: Estimate) -> list[str]:
    """Return what does not fit, and what would."""
    return list(dict.fromkeys(_warnings(found)))


def _warnings(found: Estimate) -> Iterator[str]:
    run, cluster = found.run, found.cluster
    if not found.fits and found.report.fits:
        yield f"host memory does not suffice: the first node needs at least {size(found.least.bytes)}"
    unfit = [load for load in found.report.gpus if not load.fits]
    trainers = [load for load in unfit if _needs_too_much(load, "trainer")]
    if trainers and (worst := max(trainers, key=lambda load: load.peak)).capacity is not None:
        needed = peak(_own(worst, "trainer"))
        yield f"the trainer does not fit: a rank needs about {size(needed)} and a GPU has {size(worst.capacity)}"
        gpus = max(node.gpus for node in cluster.nodes)
        layout = fitting_layout(run, gpus, worst.capacity)
        if layout is not None:
            yield f"this would fit, on {layout[0]} nodes of {gpus} such GPUs: {layout[2]}"
        else:
            yield "no layout of up to 128 such nodes holds it with Megatron-Core"
    engines = [load for load in unfit if _needs_too_much(load, "rollout")]
    if engines and (worst := max(engines, key=lambda load: load.peak)).capacity is not None:
        yield from _engine_warning(run, cluster, worst, worst.capacity)
    if any(load not in trainers and load not in engines for load in unfit):
        yield "engine and trainer do not fit on a GPU together: turn offload_rollout and offload_train on"


def _engine_warning(run: Run, cluster: Cluster, load: GpuLoad, capacity: int) -> Iterator[str]:
    parts = [part for part in _own(load, "rollout") if part.name in ("engine weights", "KV cache") and part.bytes]
    what = " and ".join(f"{part.name} of {size(part.bytes)} ({part.formula})" for part in parts)
    yield f"the engine does not fit on a GPU of {size(capacity)}: {what}"
    gpus = smallest_server(run, capacity) if run.settings.rollout_backend == "sglang" else None
    if gpus is not None and gpus <= max(node.gpus for node in cluster.nodes):
        yield f"a server of {gpus} such GPUs would hold it: --rollout-num-gpus-per-engine {gpus}"
    elif gpus is not None:
        name = "name it in --rollout-external-engine-addrs"
        yield f"a server of {gpus} such GPUs would hold it: start it over several nodes yourself and {name}"


def _needs_too_much(load: GpuLoad, process: str) -> bool:
    return load.capacity is not None and peak(_own(load, process)) > load.capacity


def _own(load: GpuLoad, process: str) -> list[Part]:
    return [part for use in load.uses if use.process.startswith(process) for part in use.device]


def _kind(load: GpuLoad) -> object:
    return load.node, load.capacity, tuple((use.process, use.device) for use in load.uses)


def host_total(found: Estimate, node: NodeLoad) -> str:
    """Say how much of a node's memory is taken."""
    there = "" if found.host_bytes is None or node.node else f" of {size(found.host_bytes)}"
    return f"node {node.node}, host memory: at most about {size(node.peak)}{there}"
