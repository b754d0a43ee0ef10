"""Formats of few bits, matrices to quantise by them, and their definitions in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from miles.precision.base import WeightFormat
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format

GROUP = 16
FORMATS: dict[str, WeightFormat] = {
    "fp8_block": weight_format(Recipe(format="fp8_block")),
    "fp8_block, powers of two": weight_format(Recipe(format="fp8_block", power_of_two_scales=True)),
    "int4": weight_format(Recipe(format="int4", group_size=GROUP)),
    "mxfp8": weight_format(Recipe(format="mxfp8")),
    "nvfp4": weight_format(Recipe(format="nvfp4")),
}
BLOCKS = {"fp8_block": (128, 128), "int4": (1, GROUP), "mxfp8": (1, 32), "nvfp4": (1, 16)}
SHAPES = ((128, 128), (5, 32), (130, 144), (1, 1008), (2, 130, 48))
TYPES = (torch.float32, torch.bfloat16)


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of mixed signs, columns of different sizes, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[-1], generator=generator) * 3


def matrices(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Finite matrices by name: random, of zeros of both signs, denormal, huge, whole numbers, the largest number."""
    ordinary = random_matrix(*shape)
    yield "random", ordinary.to(dtype)
    for scale in (1e-44, 1e-38, 1e-36, 1e-6, 1e30, 1e37):
        yield f"times {scale}", (ordinary * scale).to(dtype)
    some = ordinary.to(dtype).clone()
    some.view(-1)[::3] = 0.0
    some.view(-1)[::5] = -0.0
    yield "some zeros", some
    yield "zeros", torch.zeros(shape, dtype=dtype)
    yield "whole", torch.randint(-500, 500, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def numbers_that_are_not_finite(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Matrices with one such number: infinity of both signs, and at last NaN."""
    found = []
    for number in (float("inf"), -float("inf"), float("nan")):
        weight = random_matrix(*shape).to(dtype)
        weight.view(-1)[7] = number
        found.append((str(number), weight))
    return found


def block_maxima(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """At each element of (O, I) the largest magnitude in its block, float64."""
    height, width = BLOCKS[name.partition(",")[0]]
    found = torch.empty(matrix.shape, dtype=torch.float64)
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            block = slice(top, top + height), slice(left, left + width)
            found[block] = matrix[block].double().abs().max()
    return found


def scales_in(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """At each element of (O, I) what its value is multiplied by, float64, from the parts of a quantised matrix."""
    match name:
        case "int4":
            scales = parts["_scale"].double()
        case "mxfp8":
            scales = 2.0 ** (parts["_scale_inv"].double() - 127)
        case "nvfp4":
            scales = parts["_scale"].double() * parts["_scale_2"].double()
        case _:
            scales = parts["_scale_inv"].double()
    height, width = BLOCKS[name.partition(",")[0]]
    return scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def defined_scales(name: str, maxima: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a block's values are multiplied by, by its definition in float64, from the largest magnitudes."""
    match name:
        case "fp8_block":
            scales = maxima / 448
        case "fp8_block, powers of two":
            scales = 2.0 ** -(448 / maxima).log2().floor()
        case "int4":
            return (maxima / 7).clamp(min=1e-5).to(dtype).double()
        case "mxfp8":
            return 2.0 ** (maxima / 448).log2().ceil().clamp(min=-127)
        case _:
            second = maxima.max() / 2688 if maxima.any() else maxima.new_tensor(1.0)
            return (maxima / 6 / second).to(torch.float8_e4m3fn).double() * second
    return torch.where(maxima == 0, 1.0, scales)


def nearest(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Distance of each number to the nearest of ascending values; of those outside to the last one."""
    numbers = numbers.clamp(values[0], values[-1])
    above = torch.searchsorted(values, numbers).clamp(1, len(values) - 1)
    return torch.minimum((numbers - values[above - 1]).abs(), (values[above] - numbers).abs())


def codes(name: str) -> torch.Tensor:
    """All values of a format before scaling, float64, ascending."""
    if name == "int4":
        return torch.arange(-7, 8).double()
    if name == "nvfp4":
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        return torch.cat((-half, half)).unique()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return every[every.isfinite()].unique()


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, but for those of NaN."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    missing = left.float().isnan()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(missing, right.float().isnan()) and torch.equal(
        left.view(whole)[~missing], right.view(whole)[~missing]
    )
