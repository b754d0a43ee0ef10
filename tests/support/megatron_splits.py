"""Splits of layers over pipeline stages, by Megatron-Core itself and by `miles.pipeline_split`."""

from __future__ import annotations

import itertools

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from miles.pipeline_split import PipelineSplit, SplitError


def of_megatron(split: PipelineSplit, layers: int) -> list[list[int]]:
    """Numbers of each stage's layers."""
    parallel_state.set_virtual_pipeline_model_parallel_world_size(split.virtual)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=split.stages,
        virtual_pipeline_model_parallel_size=split.virtual,
        num_layers_in_first_pipeline_stage=split.first,
        num_layers_in_last_pipeline_stage=split.last,
        account_for_embedding_in_pipeline_split=split.with_embedding,
        account_for_loss_in_pipeline_split=split.with_loss,
    )
    found = []
    for stage in range(split.stages):
        own: list[int] = []
        for turn in range(split.virtual or 1):
            chunk = turn if split.virtual else None
            first = get_transformer_layer_offset(config, chunk, stage)
            own += range(first, first + get_num_layers_to_build(config, chunk, stage))
        found.append(own)
    return found


def main() -> None:
    """Compare every split that fits, and print how many there are."""
    compared = 0
    ends = (None, 1, 2, 4)
    for stages, virtual, first, last in itertools.product((2, 3, 4), (None, 2), ends, ends):
        for with_embedding, with_loss in itertools.product((False, True), repeat=2):
            if (first or last) and (with_embedding or with_loss):
                continue  # refused by a rule
            split = PipelineSplit(stages, virtual, None, first, last, with_embedding, with_loss)
            for layers in (4, 6, 7, 8, 10, 12):
                try:
                    own = [split.layers_of(stage, layers) for stage in range(stages)]
                except SplitError:
                    continue
                assert own == of_megatron(split, layers), (split, layers)
                compared += 1
    print("compared", compared)


if __name__ == "__main__":
    main()
