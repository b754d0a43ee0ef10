"""Rounding on a GPU in one pass over memory, by Triton kernels, with the results of the formats' own code to the bit.

That code reads and writes a matrix about ten times over: on one H200 it takes longer than the product of the matrix.
Kernels multiply, add and divide as IEEE 754 prescribes (`div_rn`, no fused multiply-add), and round by adding and
subtracting 1.5 * 2 ** 23, above which float32 numbers are whole.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from miles.precision.recipe import FP8_BLOCK

_TALL = 32
"""Rows of inputs in one program."""
_NUMBERS = 8192
"""Numbers of INT4 groups in one program."""
_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
_WHOLE = tl.constexpr(12582912.0)


def round_fp8_weight(weight: torch.Tensor, powers: bool) -> torch.Tensor:
    """A weight (..., O, I) rounded by blocks of 128 × 128."""
    return _round_fp8(weight, powers, height=FP8_BLOCK, by_rows=False)


def round_fp8_rows(rows: torch.Tensor, powers: bool) -> torch.Tensor:
    """Inputs (..., I) rounded by groups of 1 × 128."""
    return _round_fp8(rows.reshape(1, -1, rows.shape[-1]), powers, height=_TALL, by_rows=True).view(rows.shape)


def round_int4(weight: torch.Tensor, group_size: int, smallest_scale: float) -> torch.Tensor:
    """A weight (..., O, I) rounded by groups of 1 × group_size, which is a power of two and divides I."""
    weight = weight.contiguous()
    rounded, groups = torch.empty_like(weight), weight.numel() // group_size
    tall = max(_NUMBERS // group_size, 1)
    with _on(weight):
        _int4_groups[(triton.cdiv(groups, tall),)](
            weight, rounded, groups, smallest_scale, group_size, tall, **_OPTIONS
        )
    return rounded


def _round_fp8(matrices: torch.Tensor, powers: bool, *, height: int, by_rows: bool) -> torch.Tensor:
    matrices = matrices.contiguous()
    rounded = torch.empty_like(matrices)
    rows, columns = matrices.shape[-2:]
    across = triton.cdiv(columns, FP8_BLOCK)
    grid = (triton.cdiv(rows, height) * across, matrices.numel() // (rows * columns))
    largest = torch.finfo(matrices.dtype).max
    with _on(matrices):
        _fp8_blocks[grid](
            matrices, rounded, rows, columns, across, largest, height, FP8_BLOCK, powers, by_rows, **_OPTIONS
        )
    return rounded


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton starts kernels on the current device. On the CPU, where its interpreter runs them, none is chosen."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit  # type: ignore[untyped-decorator]
def _fp8_blocks(  # type: ignore[no-untyped-def]
    matrices, rounded, rows, columns, across, largest,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POWERS: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program rounds a block (HEIGHT, WIDTH) of a matrix, which shares one scale, or one a row."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (block // across) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = (block % across) * WIDTH + tl.arange(0, WIDTH)[None, :]
    places = (matrix * rows + row) * columns + column
    inside = (row < rows) & (column < columns)
    numbers = tl.load(matrices + places, mask=inside, other=0.0).to(tl.float32)
    magnitudes = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as whole numbers NaN is the largest
    if BY_ROWS:
        top = tl.max(magnitudes, axis=1)[:, None].to(tl.float32, bitcast=True)
    else:
        top = tl.max(tl.max(magnitudes, axis=1), axis=0).to(tl.float32, bitcast=True)
    factors = tl.div_rn(448.0, top)
    factors = tl.where(factors == float("inf"), largest, factors)
    factors = tl.where((top > 0) & (top < float("inf")), factors, 1.0)
    if POWERS:
        factors = (factors.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    values = numbers * factors
    values = tl.where(values > 448.0, 448.0, tl.where(values < -448.0, -448.0, values))
    values = _to_e4m3(values) * tl.div_rn(1.0, factors)
    tl.store(rounded + places, values.to(rounded.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _int4_groups(  # type: ignore[no-untyped-def]
    weight, rounded, groups, smallest_scale, SIZE: tl.constexpr, TALL: tl.constexpr
):
    """Each program rounds TALL groups of SIZE numbers."""
    group = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)[:, None]
    places = group * SIZE + tl.arange(0, SIZE)[None, :]
    inside = group < groups
    numbers = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    magnitudes = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(magnitudes, axis=1)[:, None].to(tl.float32, bitcast=True)
    scales = tl.div_rn(top, 7.0)
    scales = tl.where(scales < smallest_scale, smallest_scale, scales).to(rounded.dtype.element_ty).to(tl.float32)
    values = (tl.div_rn(numbers, tl.broadcast_to(scales, numbers.shape)) + _WHOLE) - _WHOLE
    tl.store(rounded + places, (values * scales).to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def _to_e4m3(numbers):  # type: ignore[no-untyped-def]
    """The nearest of E4M3, ties to even, of numbers up to 448; see `small_floats`."""
    bits = numbers.to(tl.int32, bitcast=True)
    exponents = tl.maximum(bits & 0x7F800000, (127 - 6) << 23)
    steps = (exponents - (3 << 23)).to(tl.float32, bitcast=True)
    per_number = ((130 << 23) - (exponents - (127 << 23))).to(tl.float32, bitcast=True)
    magnitudes = ((numbers * per_number + _WHOLE) - _WHOLE) * steps
    signed = magnitudes.to(tl.int32, bitcast=True) | (bits & -0x80000000)  # small negative numbers become -0
    return signed.to(tl.float32, bitcast=True)
