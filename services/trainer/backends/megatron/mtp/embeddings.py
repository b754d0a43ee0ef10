"""The input embeddings for MTP layers, which only read them.

Megatron-Core would keep a copy on the last stage, with gradients and masters, equal to the first stage's by summing
gradients. As no gradient of MTP layers reaches them, a loan from the first stage for one pass does. Where the output
matrix is tied to them, the last stage has them already.
Dims: V rows of this tensor-parallel rank, H hidden, S samples (1 where they are packed), M rows of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank


def borrow_embeddings(chunks: list[Any], parallel: ParallelRank) -> torch.Tensor | None:
    """Return this rank's part of the embeddings, [V, H], on the last stage, else None; collective.

    `chunks` are this rank's, wrapped or not.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    bare: list[Any] = unwrap_model(chunks)
    if parallel.pipeline_size == 1:
        own_VH: torch.Tensor = bare[0].embedding.word_embeddings.weight.detach()
        return own_VH
    is_first = parallel.pipeline_rank == 0
    if not (is_first or parallel.is_last_stage):
        return None
    for chunk in chunks:  # parameters that the next forward pass would gather are needed now
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)
    if bare[0].share_embeddings_and_output_weights:
        return bare[-1].output_layer.weight.detach() if parallel.is_last_stage else None
    if is_first:
        weight_VH = bare[0].embedding.word_embeddings.weight.detach()
    else:
        weight_VH = torch.empty_like(bare[-1].output_layer.weight)  # it has the embeddings' shape
    source = dist.get_global_rank(parallel.pipeline_group, 0)
    dist.broadcast(weight_VH, src=source, group=parallel_state.get_embedding_group())
    return None if is_first else weight_VH


def look_up(
    weight_VH: torch.Tensor, ids_SM: torch.Tensor, parallel: ParallelRank, *, sequence_parallel: bool
) -> torch.Tensor:
    """Embeddings as a model's layers take them: [M, S, H], or this rank's part of M with sequence parallelism."""
    columns_SM = ids_SM - parallel.tensor_rank * len(weight_VH)
    here_SM = (columns_SM >= 0) & (columns_SM < len(weight_VH))
    found = weight_VH[columns_SM.clamp(0, len(weight_VH) - 1)].masked_fill(~here_SM[..., None], 0)
    if parallel.tensor_size > 1:
        dist.all_reduce(found, group=parallel.tensor_group)
    rows = found.transpose(0, 1)
    return (rows.chunk(parallel.tensor_size)[parallel.tensor_rank] if sequence_parallel else rows).contiguous()
