"""The least host memory that a run needs on its first node: what is there whatever the lengths of samples."""

from __future__ import annotations

from miles.memory import host
from miles.memory.amount import Part, When
from miles.memory.engines import weights_part
from miles.memory.fsdp import fsdp_parts
from miles.memory.low_precision import low_precision_parts
from miles.memory.megatron import megatron_parts
from miles.memory.run import Run


def trainer_state(run: Run, stage: int = 0) -> tuple[list[Part], list[Part]]:
    """Return weights, gradients and optimizer of a rank on its device, and its host memory besides."""
    device, others = megatron_parts(run, stage) if run.settings.train_backend == "megatron" else fsdp_parts(run)
    return [*device, *low_precision_parts(run, stage)], others


def least_host_memory(run: Run) -> Part:
    """Return trainer and engines on CPUs; on GPUs what is offloaded, and versions of the weights on their way."""
    s = run.settings
    device, others = trainer_state(run)
    if s.device == "cpu":
        engines = s.rollout_num_workers - s.rollout_workers_elsewhere
        engines = 0 if s.rollout_external_engine_addrs is not None else engines
        ranks = s.actor_num_gpus_per_node or 1
        parts = [*((ranks, part) for part in device), (engines, weights_part(run))]
    else:
        ranks = s.actor_num_gpus_per_node or 8
        parts = [(ranks, part) for part in others if part.when is not When.LOADING]
        parts.append((1, host.versions_part(run)))
    parts += [(1, part) for rank in range(s.actor_num_gpus_per_node or 1) for part in host.compared_parts(run, rank)]
    counted = [(count, part) for count, part in parts if count and part.bytes]
    words = (f"{f'{count} × ' if count > 1 else ''}{part.name}: {part.formula}" for count, part in counted)
    return Part("host memory", sum(count * part.bytes for count, part in counted), " + ".join(words))
