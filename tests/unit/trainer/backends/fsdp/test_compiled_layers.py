"""Decoder layers under torch.compile, traced on the meta device, where variable-length attention has shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miles.precision.emulation.model import emulate
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.fsdp.attention import packed_attention as attention
from miles.services.trainer.backends.fsdp.model.compiled_layers import OPTIONS, compile_layers
from miles.services.trainer.batch.packing import EMPTY, MicroBatch, pack
from miles.services.trainer.recording.layer_reader import LayerReader
from tests.support.trainer_cases import random_groups

META = torch.device("meta")


def packed(seed: int, count: int, share: bool) -> MicroBatch:
    """So many samples of eight groups."""
    samples = [sample for group in random_groups(seed, range(8)) for sample in group.samples]
    return pack(samples, range(count), share_prompts=share)


def run(model: Any, micro_batch: MicroBatch, *, backward: bool = True) -> None:
    """Forward, and backward, of a micro-batch."""
    plan = attention.AttentionPlan(micro_batch.segments, META, torch.bfloat16)
    plan.use_varlen, plan.use_tiles = True, False  # as on CUDA
    rows = torch.zeros(1, micro_batch.num_rows, dtype=torch.int64, device=META)
    with torch.set_grad_enabled(backward):
        out = model(input_ids=rows, position_ids=rows, attention_plan=plan, use_cache=False)
    if backward:
        out.logits.sum().backward()


@pytest.mark.slow  # the compiler traces for a minute on a busy machine
@pytest.mark.parametrize(
    ("recipe", "recorded"),
    [(None, ()), (Recipe(format="fp8_block"), ()), (None, (1, 2))],
    ids=["full precision", "fp8_block", "recorded"],
)
def test_one_graph_serves_all_layers_and_all_micro_batches(recipe: Recipe | None, recorded: tuple[int, ...]) -> None:
    """The first one shares no prompt, so that its numbers of rows and of slots are equal; later ones differ in all."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with META:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.PACKED_ATTENTION
        )
    if recipe is not None:
        emulate(model, recipe, weights=False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    reader = LayerReader({layer: model.model.layers[layer] for layer in recorded})
    found: list[int] = []
    reader.begin(lambda layer, hidden_1TD: found.append(layer))
    run(model, packed(6, 4, False))
    reader.end()
    assert found == list(recorded)
    graphs = counter.frame_count
    assert 1 <= graphs < config.num_hidden_layers
    for seed, count in enumerate((5, 1, 4, 20, 32, 2)):
        for share in (True, False):
            run(model, packed(seed, count, share))
    run(model, EMPTY)
    assert counter.frame_count == graphs
    run(model, packed(1, 3, False), backward=False)
    run(model, packed(2, 9, True), backward=False)
    assert counter.frame_count == 2 * graphs


def test_the_compilers_options_are_known_to_it() -> None:
    torch.compile(torch.nn.Identity(), backend="inductor", options=OPTIONS)


def test_lengths_that_kernels_get_are_few_and_never_too_small() -> None:
    micro_batch = packed(3, 20, True)
    plan = attention.AttentionPlan(micro_batch.segments, torch.device("cpu"), torch.bfloat16)
    longest = max(segment.rows for segment in micro_batch.segments)
    seen = max(segment.prefix_rows + segment.rows for segment in micro_batch.segments)
    assert longest <= plan.varlen.max_q in (16, 32)
    assert seen <= plan.varlen.max_k in (16, 32)
    assert plan.varlen.cu_k.diff().max() == seen


def test_a_model_with_experts_is_refused() -> None:
    layer = torch.nn.Module()
    layer.experts = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="torch_compile is for dense models, and Sequential has experts; leave it out"):
        compile_layers(torch.nn.Sequential(layer))
