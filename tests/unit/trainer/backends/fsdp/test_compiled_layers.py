"""Decoder layers under torch.compile, traced on the meta device, where variable-length attention has shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miles.services.trainer.backends.fsdp.attention import packed_attention as attention
from miles.services.trainer.backends.fsdp.model.compiled_layers import compile_layers
from miles.services.trainer.batch.packing import pack
from tests.support.trainer_cases import random_groups

META = torch.device("meta")


def run(model: Any, seed: int, count: int) -> None:
    """Forward and backward of so many samples."""
    samples = [sample for group in random_groups(seed) for sample in group.samples]
    micro_batch = pack(samples, range(count), share_prompts=True)
    plan = attention.AttentionPlan(micro_batch, META, torch.bfloat16)
    plan.use_varlen, plan.use_tiles = True, False  # as on CUDA
    rows = torch.zeros(1, micro_batch.num_rows, dtype=torch.int64, device=META)
    out = model(input_ids=rows, position_ids=rows, attention_plan=plan, use_cache=False)
    out.logits.sum().backward()


@pytest.mark.slow  # the compiler traces for a minute on a busy machine
def test_one_graph_serves_all_layers_and_all_lengths() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    with META:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.PACKED_ATTENTION
        )
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    run(model, 1, 3)
    graphs = counter.frame_count
    run(model, 2, 4)
    run(model, 3, 2)
    assert 1 <= graphs < config.num_hidden_layers
    assert counter.frame_count == graphs


def test_a_model_with_experts_is_refused() -> None:
    layer = torch.nn.Module()
    layer.experts = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="torch_compile is for dense models, and Sequential has experts; leave it out"):
        compile_layers(torch.nn.Sequential(layer))
