"""MTP layers: multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) behind a model's last layer.

megatron-bridge builds them of TransformerEngine's parts alone. Here they are added to a model that is already built,
so they can be made of local layers. Megatron-Core is not told of them: it would hold a second copy of the embeddings
on the last stage and compute their loss in every pass. `training` runs them.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def add_mtp_layers(chunk: Any, count: int, *, with_engine: bool, trained: bool) -> None:
    """Add `count` layers, like the last one, to a bare chunk if it is the model's last.

    Raises ValueError where the last stage has no layer of the model's.
    """
    if not chunk.post_process:
        return
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec,
    )

    config, stage = chunk.config, chunk.vp_stage
    made = config.transformer_layer_spec(config, vp_stage=stage)
    layers = getattr(made, "layer_specs", [made])  # some families have one spec for every layer
    if not layers:
        raise ValueError(
            "the last pipeline stage has no layers, and MTP layers are made like its last one; give it one of the "
            "model's layers"
        )
    spec = get_mtp_layer_spec(layers[-1], use_transformer_engine=with_engine)
    if not with_engine:
        from miles.services.trainer.backends.megatron.layers.local_layers import Parts, with_local_parts

        spec = dataclasses.replace(spec, submodules=with_local_parts(spec.submodules, Parts()))
    block = MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * count)
    device = next(chunk.parameters()).device
    config.mtp_num_layers = count
    try:
        chunk.mtp = MultiTokenPredictionBlock(config, block, vp_stage=stage, pg_collection=chunk.pg_collection)
    finally:
        config.mtp_num_layers = None
    chunk.mtp.to(device).requires_grad_(trained)
    for module in chunk.mtp.modules():
        if hasattr(module, "is_mtp_layer"):
            module.is_mtp_layer = False  # the record of routers' losses, which nothing reads, has no places for them
