"""Megatron-Core's data parallelism around a model's chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.config.sections.megatron import MegatronConfig


def data_parallel(chunks: list[Any], layout: MegatronConfig) -> list[Any]:
    """The chunks with buffers for float32 gradients, summed over replicas.

    megatron-bridge would do this in a CUDA stream of its own. The gradient of every parameter would then be added in
    that stream, and wait for the one that computes: thousands of waits per step where layers have many experts.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        use_distributed_optimizer=layout.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            chunk.config, settings, chunk, disable_bucketing=index > 0, pg_collection=_groups(chunk)
        )
        for index, chunk in enumerate(chunks)
    ]


def _groups(chunk: Any) -> Any:
    from megatron.core.utils import unwrap_model

    return unwrap_model(chunk).pg_collection
