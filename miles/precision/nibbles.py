"""Two values of four bits in a byte, the first in the lower half."""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes (..., I / 2) of codes (..., I), uint8 below 16."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes (..., I) of bytes (..., I / 2)."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
