"""Rounding of float32 numbers to the values of floating-point types of 8 and 4 bits (OCP MX specification 1.0, 5.3).

Operations of IEEE 754 on float32 and on its bits alone, so results are the same on every device.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
_EXPONENT = 0x7F800000
_MANTISSA_BITS = 23
_BIAS = 127


def round_to_e4m3_(numbers: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers in place to the nearest of E4M3, ties to even; those beyond 448 become 448, NaN stays."""
    numbers.clamp_(-LARGEST_E4M3, LARGEST_E4M3)
    if numbers.is_cuda:
        return numbers.copy_(numbers.to(E4M3))
    return _round_(numbers, mantissa_bits=3, smallest_exponent=-6)  # CPUs convert E4M3 one number at a time


def round_to_e2m1_(numbers: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers in place to the nearest of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), ties to the even code; those
    beyond 6 become 6, NaN stays."""
    numbers.clamp_(-LARGEST_E2M1, LARGEST_E2M1)
    return _round_(numbers, mantissa_bits=1, smallest_exponent=0)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (exponent - 127) as float32, of int32 exponents from 0 to 254."""
    return (exponents << _MANTISSA_BITS).clamp(min=1 << (_MANTISSA_BITS - 1)).view(torch.float32)


def _round_(numbers: torch.Tensor, *, mantissa_bits: int, smallest_exponent: int) -> torch.Tensor:
    """Numbers of magnitude 2 ** e to the nearest multiple of 2 ** (max(e, smallest) - mantissa_bits), ties to even."""
    exponents = (numbers.view(torch.int32) & _EXPONENT).clamp_(min=(smallest_exponent + _BIAS) << _MANTISSA_BITS)
    steps = exponents.sub_(mantissa_bits << _MANTISSA_BITS).view(torch.float32)
    return numbers.div_(steps).round_().mul_(steps)
