"""The language model's head on the rows that predict response tokens alone, as Megatron-Core's `output_processor`.

A prompt's logits are never used. They would be a third of the head's arithmetic where prompts are a third of the
tokens, and as much of its memory.
Dims: L rows of this rank (a part of them with sequence parallelism), R response tokens, V columns on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def response_logits(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    context: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Logits [1, R, V] from hidden states [L, 1, H], or [M, S, H] of S padded samples; M · S is L then.

    `context` has the rows of L, int64 [R], counted over all ranks' parts.

    Megatron-Core calls this instead of its own head.
    """
    parallel = output_layer.sequence_parallel
    if parallel:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        # The head sums its gradient over ranks, so that each takes its rows' part unchanged.
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    picked = hidden_states.flatten(0, 1).index_select(0, context).unsqueeze(1)
    output_layer.sequence_parallel = False  # as Megatron-Core does for rows that are gathered already
    try:
        logits, _bias = output_layer(picked, weight=output_weight)
    finally:
        output_layer.sequence_parallel = parallel
    scaled: torch.Tensor = scale_logits(logits).transpose(0, 1)
    return scaled
