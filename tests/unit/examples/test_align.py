"""Padding of tiny random models to sizes that low-precision kernels take: the same answers, and finer blocks."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from tiny_llama import VOCABULARY, dense_model, logits
from trainer_cases import write_tokenizer
from transformers import AutoModelForCausalLM

from examples.smollm2_chain_sum import upcycle
from examples.smollm2_chain_sum.align import aligned
from miles.precision.fp8_block import SCALE_SUFFIX, Fp8Block
from miles.precision.layers import EVERY_MATRIX
from miles.precision.recipe import FP8_BLOCK

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
"""With heads of 64 as SmolLM2's; no size is a multiple of 128."""


def moe(**changes: Any) -> Any:
    return upcycle.upcycle(dense_model(**changes), router_std=1.0)


@pytest.mark.parametrize(("sizes", "multiple"), [({}, 16), (SIZES, 128)])
def test_the_padded_model_gives_the_same_answers(sizes: dict[str, int], multiple: int) -> None:
    model = moe(**sizes)
    padded = aligned(model, multiple)
    torch.testing.assert_close(logits(padded), logits(model), rtol=1e-4, atol=1e-4)
    prompt = torch.arange(5)[None]
    said = [m.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0) for m in (model, padded)]
    assert said[0].equal(said[1])
    assert padded.config.vocab_size == VOCABULARY


def test_blocks_of_the_padded_model_are_whole_and_never_coarser() -> None:
    model = moe(**SIZES)
    padded = aligned(model, FP8_BLOCK)
    for name, weight in padded.named_parameters():
        if not EVERY_MATRIX.cover(name, weight.dim()):
            continue
        assert all(size % FP8_BLOCK == 0 for size in weight.shape[-2:]), (name, weight.shape)
        before = model.get_parameter(name)
        if name.endswith("gate_up_proj"):  # gates and ups are matrices of their own
            weight, before = weight.unflatten(1, (2, -1)), before.unflatten(1, (2, -1))
        factor = 2**0.5 if name.endswith("q_proj.weight") else 1.0
        padded_scales = scale_of_each(weight)[weight != 0] / factor
        assert (padded_scales <= scale_of_each(before)[before != 0] * (1 + 1e-6)).all(), name


def scale_of_each(weight: torch.Tensor) -> torch.Tensor:
    """The scale that each element of a matrix has in FP8."""
    scales = Fp8Block().quantise(weight.detach())[SCALE_SUFFIX]
    spread = scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    return spread[..., : weight.shape[-2], : weight.shape[-1]]


def test_training_leaves_the_padding_at_zero() -> None:
    model, ones = moe(**SIZES), moe(**SIZES)
    for weight in ones.parameters():
        torch.nn.init.ones_(weight)
    padded, real = aligned(model, 128), aligned(ones, 128)
    padded(torch.arange(29)[None], labels=torch.arange(29)[None]).loss.backward()
    for name, weight in padded.named_parameters():
        padding = real.get_parameter(name) == 0
        assert not weight.grad[padding].any(), name
        assert not weight[padding].any(), name


def test_a_checkpoint_is_written_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    upcycle.main(["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "moe"), "--align", "32"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert (model.config.hidden_size, model.config.head_dim, model.config.moe_intermediate_size) == (64, 96, 64)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "moe" / "tokenizer.json").exists()


def test_what_padding_would_change_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only a glm4_moe .* not this llama"):
        aligned(dense_model(), 16)
    normed = moe()
    normed.config.use_qk_norm = True
    with pytest.raises(ValueError, match="use_qk_norm=True"):
        aligned(normed, 16)
