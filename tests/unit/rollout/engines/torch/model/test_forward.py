"""Plans laid out as one packed forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch.generation.scheduler import Scheduler
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.generation.stop import StopRule
from miles.services.rollout.engines.torch.model.attention import ATTENTION_NAME
from miles.services.rollout.engines.torch.model.forward import Forward, pack
from miles.services.rollout.engines.torch.model.invariance import Padding, RowPadding
from miles.services.rollout.engines.torch.model.kv_cache import KVCache

CPU = torch.device("cpu")


def sequence(name: str, tokens: list[int]) -> Sequence:
    return Sequence(GenerationRequest(name, tokens, SamplingParams(max_new_tokens=50)), StopRule((), None, 0))


def test_decoding_tokens_come_first_then_chunks_and_shares_point_at_their_prefix_owner() -> None:
    scheduler = Scheduler(8, 4)
    first, second = sequence("a", [1, 2]), sequence("b", [3, 4])
    for item in (first, second):
        scheduler.add(item)
    scheduler.plan()
    for item in (first, second):
        item.append(9, 0)
    scheduler.remove(first)
    for item in (sequence("c", [5, 6, 7]), sequence("d", [5, 6, 7]), sequence("e", [8, 8])):
        scheduler.add(item)
    packed = pack(scheduler.plan())
    assert packed.tokens == [9, 5, 6, 7, 8]
    assert packed.slots == [1, 0, 0, 0, 3]
    assert packed.positions == [2, 0, 1, 2, 0]
    assert [(item.request.request_id, row) for item, row in zip(packed.drawing, packed.rows, strict=True)] == [
        ("b", 0),
        ("c", 3),
        ("d", 3),
    ]


@pytest.mark.parametrize("padding", [RowPadding(16), RowPadding(64, exact=True)])
@pytest.mark.parametrize("queries", [1, 4, 16])
def test_logits_equal_those_of_whole_sequences(padding: RowPadding, queries: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    plain = LlamaForCausalLM(config).eval()
    slotted = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME).eval()
    slotted.load_state_dict(plain.state_dict())
    cache = KVCache(layers=2, kv_heads=2, head_dim=8, max_slots=4, max_length=200, dtype=torch.float32, device=CPU)
    forward = Forward(slotted, cache, dtype=torch.float32, device=CPU, padding=Padding(padding, padding, queries, 30))
    scheduler = Scheduler(4, 30)
    prompts = [[1, 2, 3], list(range(45)), [1, 2, 3], list(range(20)), [7]]
    for i, prompt in enumerate(prompts):
        scheduler.add(sequence(str(i), prompt))
    with torch.no_grad():
        for step in range(40):
            plan = scheduler.plan()
            forward.prepare(plan)
            packed = pack(plan)
            logits = forward.run(plan, packed)
            for row, item in enumerate(packed.drawing):
                expected = plain(torch.tensor([item.tokens]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
                item.append(int(logits[row].argmax()), 0)
            if step == 20:
                scheduler.remove(scheduler.running[0])
    assert [item.request.request_id for item in scheduler.running] == ["4", "1", "2", "3"]
