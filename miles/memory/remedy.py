"""Layouts and servers that would fit, for ones that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from miles.memory import host
from miles.memory.amount import peak
from miles.memory.engines import static_fraction, weights_part
from miles.memory.megatron import Layout
from miles.memory.model import ModelShape
from miles.memory.report import trainer_parts
from miles.memory.run import Run

_NODES = (1, 2, 4, 8, 16, 32, 64, 128)
_SAFE = 0.9
"""Part of a GPU that a layout may fill to be named."""


def fitting_layout(run: Run, gpus_per_node: int, gpu_bytes: int) -> tuple[int, Layout, str] | None:
    """Return nodes, a Megatron layout, and its flags, for the fewest nodes whose GPUs hold the trainer; None if none.

    With the distributed optimizer, and all layers recomputed.
    """
    if run.policy.shape is None:
        return None
    for nodes in _NODES:
        fitting = []
        for layout in _layouts(run, run.policy.shape, nodes * gpus_per_node, gpus_per_node):
            needed = _needed(run, layout, nodes, gpus_per_node)
            if needed <= _SAFE * gpu_bytes:
                fitting.append((layout.pipeline, layout.tensor, needed, layout))
        if fitting:
            layout = min(fitting, key=lambda each: each[:3])[3]
            return nodes, layout, _flags(nodes, gpus_per_node, layout)
    return None


def smallest_server(run: Run, gpu_bytes: int) -> int | None:
    """Return the fewest GPUs, a power of two, over which an SGLang server's weights fit; None beyond 64."""
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        changed = _with(run, rollout_num_gpus_per_engine=gpus)
        room = static_fraction(changed, gpu_bytes) * gpu_bytes
        if weights_part(changed).bytes <= _SAFE * room:
            return gpus
    return None


def _layouts(run: Run, shape: ModelShape, ranks: int, gpus_per_node: int) -> Iterator[Layout]:
    groups = shape.heads if shape.latent is not None else shape.key_value_heads
    batch = run.settings.global_batch_size
    for tensor in (1, 2, 4, 8):
        fits = tensor <= gpus_per_node and not shape.heads % tensor and not (groups % tensor and tensor % groups)
        for pipeline in (1, 2, 4, 8, 16) if fits else ():
            if shape.layers % pipeline or ranks % (tensor * pipeline) or batch % (ranks // (tensor * pipeline)):
                continue
            for expert in (1, 2, 4, 8, 16, 32, 64, 128, 256) if shape.experts else (1,):
                if shape.experts % expert == 0 and ranks % (expert * pipeline) == 0:
                    etp = 1 if expert > 1 else tensor
                    yield Layout(ranks, tensor, pipeline, 1, 1, expert, etp, distributed_optimizer=True)


def _needed(run: Run, layout: Layout, nodes: int, gpus_per_node: int) -> int:
    changed = _with(
        run,
        train_backend="megatron",
        actor_num_nodes=nodes,
        actor_num_gpus_per_node=gpus_per_node,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        num_virtual_stages_per_pipeline_rank=None,
        num_layers_per_virtual_pipeline_stage=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        pipeline_model_parallel_layout=None,
        context_parallel_size=1,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        use_distributed_optimizer=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    stages = {0, layout.pipeline - 1}
    return max(peak([*trainer_parts(changed, stage)[0], host.context_part()]) for stage in stages)


def _with(run: Run, **changes: object) -> Run:
    return dataclasses.replace(run, settings=run.settings.changed(**changes))


def _flags(nodes: int, gpus_per_node: int, layout: Layout) -> str:
    flags = [f"--actor-num-nodes {nodes}", f"--actor-num-gpus-per-node {gpus_per_node}"]
    sizes = (("tensor", layout.tensor), ("pipeline", layout.pipeline), ("expert", layout.expert))
    flags += [f"--{name}-model-parallel-size {size}" for name, size in sizes if size > 1]
    if layout.tensor > 1:
        flags.append("--sequence-parallel")
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return " ".join([*flags, "--use-distributed-optimizer", recompute])
