"""Attention of packed micro-batches against attention sample by sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from trainer_cases import random_groups

from miles.services.trainer.backends.fsdp.attention import tiles
from miles.services.trainer.backends.fsdp.attention.packed_attention import AttentionPlan, packed_attention
from miles.services.trainer.batch.packing import MicroBatch, pack
from miles.types import Sample

HEADS, KV_HEADS, SIZE = 4, 2, 8
VALUE_SIZE = 6
"""Of a head's values; latent attention has smaller ones than keys."""
SAMPLES: list[Sample] = [sample for group in random_groups(5, range(5)) for sample in group.samples]
for sample, other in itertools.pairwise(SAMPLES):
    if sample.group_id == other.group_id:  # begin alike beyond the prompt, and part one after the other
        common = min(len(sample.tokens), len(other.tokens)) // 2 + sample.prompt_length // 2
        other.tokens[:common] = sample.tokens[:common]


def reference(
    micro_batch: MicroBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v row by row over the rows it may see, scores capped; [1, T, H, V]."""
    rows = []
    key, value = (x[0].repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, value))
    for segment in micro_batch.segments:
        for row in range(segment.start, segment.end):
            seen = [int(other) for other in segment.seen_rows() if other <= row]
            seen = seen[-window:] if window is not None else seen
            scores = torch.einsum("hd,htd->ht", query[0, :, row], key[:, seen]) * SIZE**-0.5
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), value[:, seen]))
    return torch.stack(rows)[None]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.5), (4, 0.5)])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("use_tiles", [True, False])
def test_rows_attend_to_their_own_sample_alone(
    use_tiles: bool, share: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "MAX_SCORES", 2**21 if use_tiles else 0)
    torch.manual_seed(0)
    micro_batch = pack(SAMPLES, range(len(SAMPLES)), share_prompts=share)
    plan = AttentionPlan(micro_batch.segments, torch.device("cpu"), torch.float32)
    assert plan.use_tiles is use_tiles
    query, key, value = (
        torch.randn(1, heads, micro_batch.num_rows, size, dtype=torch.float64, requires_grad=True)
        for heads, size in ((HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, VALUE_SIZE))
    )
    out, _ = packed_attention(
        *(torch.nn.Identity(), query, key, value, None, SIZE**-0.5),
        sliding_window=window,
        softcap=softcap,
        attention_plan=plan,
    )
    expected = reference(micro_batch, query, key, value, window, softcap)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), (query, key, value))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_model_that_is_called_without_a_plan_is_told_so() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="attention_plan="):
        packed_attention(torch.nn.Identity(), x, x, x, None)


def test_attention_that_is_not_computed_here_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1)
    plan = AttentionPlan(pack(SAMPLES, (0,), share_prompts=False).segments, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="does not do s_aux"):
        packed_attention(torch.nn.Identity(), x, x, x, None, attention_plan=plan, s_aux=torch.zeros(1))
    chosen = torch.zeros(1, 1, plan.segments[0].rows - 1)
    with pytest.raises(ValueError, match=f"set rollout_max_context_len to at most {chosen.shape[-1]}"):
        packed_attention(torch.nn.Identity(), x, x, x, None, attention_plan=plan, indices=chosen)
    with pytest.raises(ValueError, match="varlen needs CUDA"):
        AttentionPlan(
            pack(SAMPLES, (0,), share_prompts=False).segments, torch.device("cpu"), torch.bfloat16, varlen=True
        )


def test_heads_of_a_size_that_the_kernel_has_not_are_computed_without_it() -> None:
    torch.manual_seed(0)
    micro_batch = pack(SAMPLES, range(len(SAMPLES)), share_prompts=True)
    x = torch.randn(1, 1, micro_batch.num_rows, 6)
    plans = [AttentionPlan(micro_batch.segments, torch.device("cpu"), torch.float32) for _ in range(2)]
    plans[1].use_varlen = True  # as on CUDA
    found = [packed_attention(torch.nn.Identity(), x, x, x, None, attention_plan=plan)[0] for plan in plans]
    assert found[0].equal(found[1])
