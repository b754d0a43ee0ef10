"""Every format against its definition in float64, and what all formats promise."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from format_cases import (
    FORMATS,
    SHAPES,
    TYPES,
    block_maxima,
    codes,
    defined_scales,
    matrices,
    nearest,
    random_matrix,
    same,
    scales_in,
)

from miles.precision.rounding import rounded_inputs, rounded_weight

TINY = ("times 1e-44", "times 1e-38", "times 1e-36")
TIES_AND_EXTREMES = {
    "fp8_block": ([448.0, 17.0, 19.0, -17.0, 0.0, 2**-9, 2**-10, 3 * 2**-10], [448, 16, 20, -16, 0, 2**-9, 0, 2**-8]),
    "int4": ([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5, -7.0], [7, 0, 2, 2, 0, -2, 6, -7]),
    "mxfp8": ([448.0, 17.0, 19.0, -17.0, 0.0, 2**-9, 2**-10, 3 * 2**-10], [448, 16, 20, -16, 0, 2**-9, 0, 2**-8]),
    "nvfp4": ([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0], [6, 0, 1, 1, 2, 2, 4, -4]),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_nearest_with_the_scales_of_the_definition(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = codes(name)
    for case, weight in matrices(shape, dtype):
        if case in TINY:
            continue  # quotients or scales leave the range of float32
        parts = FORMATS[name].quantise(weight)
        scales, defined = scales_in(name, parts, shape), defined_scales(name, block_maxima(name, weight), dtype)
        # Where float32 reaches the middle between two E4M3 numbers that float64 misses, a scale is the other one.
        assert torch.isclose(scales, defined, rtol=2.0**-22, atol=0).double().mean() > 0.95, case
        assert torch.allclose(scales, defined, rtol=2.0**-3, atol=0), case
        held = FORMATS[name].dequantise(parts, torch.float32).double()
        exact = weight.double() / scales.where(scales != 0, 1.0)
        off = (exact.clamp(values[0], values[-1]) - held / scales.where(scales != 0, 1.0)).abs()
        assert (off <= nearest(exact, values) + 2.0**-20 * exact.abs())[scales != 0].all(), case
        assert not held[scales == 0].any(), case


@pytest.mark.parametrize("name", TIES_AND_EXTREMES)
def test_ties_go_to_the_even_value(name: str) -> None:
    numbers, expected = TIES_AND_EXTREMES[name]
    weight = torch.tensor([numbers + [0.0] * 8]).mul(8)
    if name == "nvfp4":
        weight[0, 0] = 6 * 448  # the scale of the matrix is 1 then, and the second group has a scale of its own
        weight = torch.cat((torch.zeros_like(weight), weight), 1)
        weight[0, 0], weight[0, 16] = 6 * 448, 6 * 8
    rounded = FORMATS[name].rounded(weight)[0, -16:-8] / 8
    assert rounded.tolist() == expected


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_have_the_stated_layout_and_stand_for_the_rounded_matrix(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    chosen = FORMATS[name]
    for case, weight in matrices(shape, dtype):
        parts = chosen.quantise(weight)
        layout = [(suffix, part.dtype, tuple(part.shape)) for suffix, part in parts.items()]
        assert layout == list(chosen.parts(dtype, shape))
        assert all(part.is_contiguous() for part in parts.values())
        rounded = chosen.rounded(weight)
        assert rounded.is_contiguous()
        assert same(chosen.dequantise(parts, dtype), rounded), case


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_behind_leading_dimensions_are_quantised_one_by_one(name: str) -> None:
    chosen, weights = FORMATS[name], random_matrix(2, 3, 130, 32)
    parts = chosen.quantise(weights)
    rounded = chosen.rounded(weights)
    for a in range(2):
        for b in range(3):
            alone = chosen.quantise(weights[a, b])
            for suffix, part in parts.items():
                assert same(part if suffix == "_shape" else part[a, b], alone[suffix])
            assert same(rounded[a, b], chosen.rounded(weights[a, b]))


@pytest.mark.parametrize("name", FORMATS)
def test_views_that_are_not_contiguous_are_quantised_as_copies_are(name: str) -> None:
    chosen, weight = FORMATS[name], random_matrix(144, 304).T
    assert same(chosen.rounded(weight), chosen.rounded(weight.contiguous()))
    assert all(map(same, chosen.quantise(weight).values(), chosen.quantise(weight.contiguous()).values()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["fp8_block, powers of two", "mxfp8"])
def test_rounding_twice_is_rounding_once_with_scales_that_are_powers_of_two(name: str, dtype: torch.dtype) -> None:
    """With other scales the largest number may change in the last place, and with it the scale."""
    for _, weight in matrices((130, 144), dtype):
        once = FORMATS[name].rounded(weight)
        assert same(FORMATS[name].rounded(once), once)


def test_rounding_int4_twice_is_rounding_once_in_float32_where_a_group_has_the_largest_value() -> None:
    once = FORMATS["int4"].rounded(random_matrix(130, 144))
    assert torch.allclose(FORMATS["int4"].rounded(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_rounded_the_same_way_whatever_is_beside_it(name: str, dtype: torch.dtype) -> None:
    rows = random_matrix(7, 5, 144).to(dtype)
    found = FORMATS[name].rounded_rows(rows)
    assert (found.dtype, found.shape) == (rows.dtype, rows.shape)
    assert same(found[3, 2], FORMATS[name].rounded_rows(rows[3, 2]))
    assert same(found[3:4, :2], FORMATS[name].rounded_rows(rows[3:4, :2]))
    assert FORMATS[name].rounded_rows(rows[:0]).shape == (0, 5, 144)


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block, powers of two", "mxfp8", "nvfp4"])
def test_rows_are_rounded_as_a_weight_of_one_row_is(name: str) -> None:
    row = random_matrix(1, 300)
    assert same(FORMATS[name].rounded_rows(row), FORMATS[name].rounded(row))


def test_int4_is_a_format_of_weights_alone() -> None:
    rows = random_matrix(3, 48)
    assert same(FORMATS["int4"].rounded_rows(rows), rows)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_number_that_is_not_finite_stays_visible_or_saturates(name: str, dtype: torch.dtype, number: float) -> None:
    weight = random_matrix(130, 144).to(dtype)
    weight[129, 143] = number
    chosen = FORMATS[name]
    rounded = chosen.rounded(weight)
    assert same(chosen.dequantise(chosen.quantise(weight), dtype), rounded)
    if number != number or name == "int4":
        assert rounded[129, 143].isnan()
    else:
        assert rounded[129, 143].abs() >= codes(name)[-1]
        assert rounded[129, 143].sign() == (1 if number > 0 else -1)
    if name != "nvfp4":  # one scale for all
        assert rounded[0].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1])
@pytest.mark.parametrize("name", FORMATS)
def test_every_nan_is_rounded_alike(name: str, bits: int) -> None:
    """Processors and GPUs have other bits for the result of an invalid operation."""
    weight, usual = random_matrix(5, 32), random_matrix(5, 32)
    weight.view(torch.int32)[3, 7] = bits
    usual[3, 7] = float("nan")
    assert same(FORMATS[name].rounded(weight), FORMATS[name].rounded(usual))


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_go_straight_through(name: str) -> None:
    weight = random_matrix(48, 32).requires_grad_()
    rows = random_matrix(7, 32, seed=1).requires_grad_()
    found = rounded_inputs(FORMATS[name], rows) @ rounded_weight(FORMATS[name], "proj.weight", weight).T
    upstream = random_matrix(7, 48, seed=2)
    found.backward(upstream)
    assert weight.grad is not None
    assert rows.grad is not None
    assert torch.equal(weight.grad, upstream.T @ FORMATS[name].rounded_rows(rows.detach()))
    assert torch.equal(rows.grad, upstream @ FORMATS[name].rounded(weight.detach()))


@pytest.mark.parametrize("name", FORMATS)
def test_gates_and_ups_of_experts_share_no_block(name: str) -> None:
    weight = random_matrix(3, 96, 32)
    rounded = rounded_weight(FORMATS[name], "mlp.experts.gate_up_proj", weight)
    for expert in range(3):
        gate, up = weight[expert].chunk(2)
        assert same(rounded[expert], torch.cat((FORMATS[name].rounded(gate), FORMATS[name].rounded(up))))


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("int4", (8, 24), "no multiple of the group size 16"),
        ("nvfp4", (8, 25), "of an odd length"),
    ],
)
def test_matrices_that_a_format_cannot_hold_are_refused(name: str, shape: tuple[int, int], problem: str) -> None:
    assert problem in str(FORMATS[name].why_not(shape))
    with pytest.raises(ValueError, match=problem):
        FORMATS[name].quantise(torch.zeros(shape))


@hypothesis.given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32), dtype=st.sampled_from(TYPES))
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_bits_are_rounded_to_what_their_parts_stand_for(bits: list[int], dtype: torch.dtype) -> None:
    weight = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).view(2, 16).to(dtype)
    for name, chosen in FORMATS.items():
        assert same(chosen.dequantise(chosen.quantise(weight), dtype), chosen.rounded(weight)), name
        if weight.isfinite().all():
            assert not chosen.rounded(weight).isnan().any(), name
