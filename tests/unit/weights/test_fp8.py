"""FP8 by blocks against float64, and which weights stay as they are."""

from __future__ import annotations

import pytest
import torch

from miles.weights.export_format import formatted, formatted_layout
from miles.weights.fp8 import BLOCK, LARGEST, Fp8Blocks, dequantise, dequantise_weights, quantise, scale_shape

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator) * 3


def blocks(shape: tuple[int, int]) -> list[tuple[int, int, slice, slice]]:
    rows, columns = scale_shape(shape)
    return [
        (p, q, slice(p * BLOCK, (p + 1) * BLOCK), slice(q * BLOCK, (q + 1) * BLOCK))
        for p in range(rows)
        for q in range(columns)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (300, 129), (5, 7), (1, 1000)])
def test_scales_and_values_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = random(*shape).to(dtype)
    values_OI, scales_PQ = quantise(weight_OI)
    assert (values_OI.dtype, scales_PQ.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert tuple(scales_PQ.shape) == scale_shape(shape)
    for p, q, rows, columns in blocks(shape):
        block = weight_OI[rows, columns].double()
        scale = scales_PQ[p, q].double()
        assert scale.item() == pytest.approx(block.abs().max().item() / LARGEST, rel=1e-7)
        values = values_OI[rows, columns].double()
        assert values.abs().max() == LARGEST
        nearest = (block / scale).unsqueeze(-1).sub(E4M3).abs().amin(-1)
        off = (block / scale - values).abs()
        # A quotient in float32 may reach the middle between two values that it misses in float64.
        assert (off <= nearest + 2.0**-22 * values.abs()).all()


def test_ties_go_to_the_even_value() -> None:
    weight_OI = torch.tensor([[LARGEST, 17.0, 19.0, -17.0, 0.0]])  # between 16 and 18, 18 and 20
    values_OI, scales_PQ = quantise(weight_OI)
    assert scales_PQ.item() == 1
    assert values_OI.float().tolist() == [[448, 16, 20, -16, 0]]


def test_a_block_of_zeros_is_zeros() -> None:
    weight_OI = torch.zeros(130, 4)
    weight_OI[129] = 2.0
    values_OI, scales_PQ = quantise(weight_OI)
    assert scales_PQ.flatten().tolist() == [1.0, pytest.approx(2 / LARGEST)]
    assert torch.equal(dequantise(values_OI, scales_PQ, torch.float32)[:129], weight_OI[:129])


def test_each_expert_of_a_stack_is_a_matrix_of_its_own() -> None:
    weight_EOI = random(3, 140, 200)
    values, scales = quantise(weight_EOI)
    assert tuple(scales.shape) == (3, 2, 2)
    for expert in range(3):
        alone = quantise(weight_EOI[expert])
        assert torch.equal(alone[0].float(), values[expert].float())
        assert torch.equal(alone[1], scales[expert])


def test_what_comes_back_is_within_half_a_step_and_quantises_to_the_same() -> None:
    weight_OI = random(256, 200)
    values_OI, scales_PQ = quantise(weight_OI)
    back_OI = dequantise(values_OI, scales_PQ, torch.float32)
    step = back_OI.abs().mul(2**-3).clamp(min=scales_PQ.max() * 2**-9)
    assert ((back_OI - weight_OI).abs() <= step / 2 * 1.001).all()
    again_OI, _ = quantise(back_OI)
    assert torch.equal(again_OI.float(), values_OI.float())


NAMES = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.mlp.gate_proj.weight": (32, 16),
    "model.layers.0.mlp.gate.weight": (4, 16),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "lm_head.weight": (50, 16),
}


def test_embeddings_norms_head_and_router_stay_as_they_are() -> None:
    tensors = {name: random(*shape, seed=i).bfloat16() for i, (name, shape) in enumerate(NAMES.items())}
    form = Fp8Blocks(["layers.0.self_attn"])
    sent = dict(formatted(form, tensors.items()))
    layout = formatted_layout(form, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    assert [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()] == layout
    scaled = {name.removesuffix("_scale_inv") for name in sent if name.endswith("_scale_inv")}
    assert scaled == {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"}
    whole = dequantise_weights(sent, torch.bfloat16)
    assert whole.keys() == tensors.keys()
    assert all(whole[name] is tensors[name] for name in tensors.keys() - scaled)


def test_values_and_scales_that_do_not_pair_up_are_named() -> None:
    values, scales = quantise(random(8, 8))
    tensors = {"a": values, "b": values, "b_scale_inv": scales[None], "c_scale_inv": scales, "d": scales}
    tensors["d_scale_inv"] = scales
    with pytest.raises(ValueError, match="do not pair up") as error:
        dequantise_weights(tensors, torch.float32)
    for part in ("c_scale_inv has no values c", "a is torch.float8_e4m3fn, without", "b_scale_inv has shape", "d is"):
        assert part in str(error.value)
