"""Everything that takes memory, by process and GPU, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from miles.config.server_groups import READ, servers_of_service
from miles.memory import host
from miles.memory.activations import activation_parts
from miles.memory.amount import Part, When, peak
from miles.memory.engines import engine_parts
from miles.memory.least import trainer_state
from miles.memory.low_precision import KERNEL_WEIGHTS
from miles.memory.megatron import layout_of
from miles.memory.run import Run
from miles.memory.samples import queue_part, rank_samples_part, rollout_samples_part
from miles.placement.deal import Placement
from miles.placement.nodes import Cluster

_TIGHT = 0.9
"""Part of a GPU's memory from which on fragments of the allocator, and kernels' workspaces, become a worry."""


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """What one rank of the trainer, or one GPU of an engine, takes."""

    process: str
    """Name of the process in the plan."""
    part: str
    """Which rank, or which server."""
    node: int
    gpu: int | None
    """None on CPUs."""
    device: tuple[Part, ...]
    """In the GPU's memory; in the host's, on CPUs."""
    host: tuple[Part, ...]
    """In host memory besides."""


@dataclasses.dataclass(frozen=True, slots=True)
class GpuLoad:
    """One GPU and what is on it."""

    node: int
    gpu: int
    capacity: int | None
    uses: tuple[Use, ...]

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return peak([part for use in self.uses for part in use.device])

    @property
    def fits(self) -> bool:
        """Whether that is at most what the GPU has; True when that is not known."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def tight(self) -> bool:
        """Whether a trainer leaves little room; an engine takes what there is by itself."""
        trains = any(use.process.startswith("trainer") for use in self.uses)
        used = peak([part for use in self.uses for part in use.device if part.when is not When.GENERATING])
        return trains and self.capacity is not None and used > _TIGHT * self.capacity


@dataclasses.dataclass(frozen=True, slots=True)
class NodeLoad:
    """Host memory of one node."""

    node: int
    parts: tuple[Part, ...]
    """Of processes together by name."""

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return peak(self.parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The estimates of a run."""

    uses: tuple[Use, ...]
    gpus: tuple[GpuLoad, ...]
    nodes: tuple[NodeLoad, ...]

    @property
    def fits(self) -> bool:
        """Whether every GPU's share fits."""
        return all(gpu.fits for gpu in self.gpus)


def trainer_parts(run: Run, stage: int = 0) -> tuple[list[Part], list[Part]]:
    """Return what a rank of the trainer takes on its device, and in host memory besides, without its process itself."""
    state, others = trainer_state(run, stage)
    device = [*state, *activation_parts(run, stage), host.buckets_part(run)]
    if not run.parks:
        return device, others
    kept = [part for part in state if part.when is When.ALWAYS and part.name != KERNEL_WEIGHTS]  # which are freed
    moved = sum(part.bytes for part in kept if not part.name.endswith("gradients"))
    parked = Part("parked trainer", moved, "weights and optimizer of a rank while the engines work, pinned")
    return [dataclasses.replace(part, when=When.TRAINING) for part in device], [*others, parked]


def report_of(run: Run, cluster: Cluster, placement: Placement | None) -> Report:
    """Return the estimates of a run whose GPUs were dealt; without a placement everything is in the host's memory."""
    uses = [*_trainer_uses(run, placement), *_rollout_uses(run, cluster, placement)]
    gpus = _gpus(cluster, uses) if placement is not None else ()
    return Report(tuple(uses), gpus, _nodes(run, uses))


def _trainer_uses(run: Run, placement: Placement | None) -> list[Use]:
    if run.settings.debug_rollout_only:
        return []
    on_gpu = placement is not None
    places = [(place.node, gpu) for place in placement.trainer for gpu in place.gpus] if placement else []
    stage_of = layout_of(run).stage_of if run.settings.train_backend == "megatron" else (lambda rank: 0)
    by_stage = {stage: trainer_parts(run, stage) for stage in {stage_of(rank) for rank in range(run.ranks)}}
    uses = []
    for rank in range(run.ranks):
        device, others = by_stage[stage_of(rank)]
        own = [part for part in others if part.when is not When.LOADING or rank == 0]
        own += [*host.compared_parts(run, rank), rank_samples_part(run, rank)]
        node, gpu = places[rank] if on_gpu else (rank // (run.settings.actor_num_gpus_per_node or 1), None)
        context = [host.context_part()] if on_gpu else []
        process = host.process_part("cuda" if on_gpu else "cpu")
        uses.append(Use("trainer-0", f"rank {rank}", node, gpu, (*device, *context), (*own, process)))
    return uses


def _rollout_uses(run: Run, cluster: Cluster, placement: Placement | None) -> list[Use]:
    s = run.settings
    if s.rollout_external_engine_addrs is not None or s.debug_train_only:
        return []
    if placement is None:
        held, device = (host.process_part("cpu"), rollout_samples_part(run)), tuple(engine_parts(run))
        here = s.rollout_num_workers - s.rollout_workers_elsewhere
        return [Use(f"rollout-{i}", "engine", 0, None, device, held) for i in range(here)]
    servers, uses = s.rollout_backend == "sglang", []
    listed = servers_of_service({key: getattr(s, key) for key in READ}) if servers else ()
    # Of each GPU of a service: number and size of the server that has it.
    owner = [(at, server.gpus) for at, server in enumerate(listed) for _ in range(server.gpus)]
    for service, place in enumerate(placement.rollouts):
        for number, gpu in enumerate(place.gpus):
            capacity = cluster.nodes[place.node].gpu_bytes
            at, gpus = owner[number] if servers else (0, 1)
            own_size = dataclasses.replace(run, settings=s.changed(rollout_num_gpus_per_engine=gpus))
            parts = engine_parts(own_size, capacity, _resident(run, placement, place.node, gpu))
            parts += [] if servers else [host.context_part()]
            part = f"server {at}" if servers else "engine"
            own = (host.process_part("cuda"), *([rollout_samples_part(run)] if number == 0 else []))
            uses.append(Use(f"rollout-{service}", part, place.node, gpu, tuple(parts), own))
    return uses


def _resident(run: Run, placement: Placement, node: int, gpu: int) -> int:
    """Return what a trainer's rank keeps on a GPU while engines start there."""
    for first, place in enumerate(placement.trainer):
        if place.node == node and gpu in place.gpus:
            stage = 0
            if run.settings.train_backend == "megatron":
                stage = layout_of(run).stage_of(first * len(place.gpus) + place.gpus.index(gpu))
            kept = [part for part in trainer_parts(run, stage)[0] if part.when is When.ALWAYS]
            return sum(part.bytes for part in [*kept, host.context_part()])
    return 0


def _gpus(cluster: Cluster, uses: Sequence[Use]) -> tuple[GpuLoad, ...]:
    found: dict[tuple[int, int], list[Use]] = defaultdict(list)
    for use in uses:
        if use.gpu is not None:
            found[use.node, use.gpu].append(use)
    return tuple(
        GpuLoad(node, gpu, cluster.nodes[node].gpu_bytes, tuple(there)) for (node, gpu), there in sorted(found.items())
    )


def _nodes(run: Run, uses: Sequence[Use]) -> tuple[NodeLoad, ...]:
    """Return host memory by node: of one name, all processes' parts together."""
    loads = []
    shared = run.settings.update_weight_transfer_mode in ("auto", "shared_memory")
    for node in sorted({use.node for use in uses} | {0}):
        parts: list[Part] = []
        for use in uses:
            if use.node == node:
                parts += [*use.host, *(use.device if use.gpu is None else ())]
        together = _together(parts)
        if shared:
            together.append(host.versions_part(run))
        if node == 0 and run.settings.redis_url is None:
            together.append(queue_part(run))
        loads.append(NodeLoad(node, tuple(together)))
    return tuple(loads)


def _together(parts: Sequence[Part]) -> list[Part]:
    """Return equal parts as one, with how many they are."""
    counts: dict[Part, int] = defaultdict(int)
    for part in parts:
        counts[part] += 1
    return [
        part
        if count == 1
        else dataclasses.replace(part, bytes=count * part.bytes, formula=f"{count} × ({part.formula})")
        for part, count in counts.items()
    ]
