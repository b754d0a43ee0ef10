"""Matrices that are quantised again from what their parts stand for, as those of folders are."""

from __future__ import annotations

import pytest
import torch

from miles.precision.fp8_block import Fp8Block
from miles.precision.int4 import Int4


def weight(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(512, 640, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    "codec", [Fp8Block(), Fp8Block(power_of_two_scales=True), Int4(32), Int4(128)], ids=["fp8", "powers", "32", "128"]
)
def test_what_was_quantised_from_bfloat16_is_the_same_to_the_bit(codec: Fp8Block | Int4) -> None:
    parts = codec.quantise(weight(torch.bfloat16))
    again = codec.quantise(codec.dequantise(parts, torch.bfloat16))
    assert parts.keys() == again.keys()
    assert all(torch.equal(parts[suffix].float(), again[suffix].float()) for suffix in parts)


def test_numbers_of_other_int4_scales_move_to_ours() -> None:
    """Scales as compressed-tensors chooses them: the largest magnitude over 7.5, and values from -8 to 7."""
    before = weight(torch.bfloat16).float()
    groups = before.view(512, -1, 32)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    published = ((groups / scales).round().clamp(-8, 7) * scales).flatten(-2).bfloat16()
    ours = Int4(32).rounded(published).float()
    published = published.float()
    assert 0.27 < float((ours != published).float().mean()) < 0.33
    assert 0.045 < float((ours - published).norm() / published.norm()) < 0.055
    assert 0.085 < float((published - before).norm() / before.norm()) < 0.1
