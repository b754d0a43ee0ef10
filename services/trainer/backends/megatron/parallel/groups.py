"""Megatron-Core's process groups for a parallel layout, and this rank's coordinates in it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.config.checks.model_layout import layer_count
from miles.pipeline_split import split_of
from miles.services.trainer.step.data_ranks import DataRanks

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True, slots=True)
class ParallelRank:
    """This rank's coordinates in the parallel layout, and its groups."""

    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    data: DataRanks
    """Replicas of the model; context-parallel ranks share one."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the logits (of the last virtual stage)."""
        return self.pipeline_rank == self.pipeline_size - 1


def initialize(config: JobConfig) -> ParallelRank:
    """Make the groups out of the ranks of the default process group; collective. Replaces existing groups.

    Raises SplitError, a ValueError, for a pipeline that does not fit the layers of hf_checkpoint.
    """
    from megatron.core import parallel_state, tensor_parallel

    destroy()
    layout, layers = config.megatron, layer_count(str(config.rollout.hf_checkpoint))
    virtual = 1 if layers is None else split_of(layout).virtual_stages(layers)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.cluster.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
    replicas = parallel_state.get_data_parallel_world_size()
    return ParallelRank(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        context_group=parallel_state.get_context_parallel_group(),
        data=DataRanks(
            rank=parallel_state.get_data_parallel_rank(),
            count=replicas,
            group=parallel_state.get_data_parallel_group() if replicas > 1 else None,
        ),
    )


def destroy() -> None:
    """Destroy the groups; collective.

    Megatron-Core only forgets most of its groups. Each keeps threads (gloo) or buffers on the GPU (NCCL) until it is
    destroyed: after some jobs in one process, hundreds of threads that wake up a hundred times a second.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the default group, which others use
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def from_last_stage(values: torch.Tensor, parallel: ParallelRank) -> torch.Tensor:
    """The last pipeline stage's tensor on every stage; other stages pass one of the same shape and dtype."""
    if parallel.pipeline_size > 1:
        last = dist.get_global_rank(parallel.pipeline_group, parallel.pipeline_size - 1)
        dist.broadcast(values, src=last, group=parallel.pipeline_group)
    return values


class SumOverRanks(torch.autograd.Function):
    """Sum over a group whose ranks then all compute the same loss, so that the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
