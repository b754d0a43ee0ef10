"""Expert indices in the narrowest data type that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_EXPERTS = 65536


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """Return the type of expert indices: uint8 up to 256 experts, uint16 up to 65536; else raise ValueError."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts = {num_experts}; allowed: 1 to {MAX_EXPERTS}")
    return np.dtype("<u1" if num_experts <= 256 else "<u2")


def narrow_experts(indices: npt.NDArray[np.integer[Any]], num_experts: int) -> npt.NDArray[np.integer[Any]]:
    """Narrow expert indices, any integer type and shape, to `expert_dtype(num_experts)`.

    Returns the array itself when it already has that type. Raises ValueError naming the first index outside
    [0, num_experts), TypeError when `indices` does not hold integers.
    """
    dtype = expert_dtype(num_experts)
    if not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"expert indices have dtype {indices.dtype}; expected integers")
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < num_experts:
        outside = np.argwhere((indices < 0) | (indices >= num_experts))[0]
        position = tuple(int(i) for i in outside)
        raise ValueError(f"expert index {indices[position]} at {position} is outside [0, {num_experts})")
    return np.ascontiguousarray(indices, dtype=dtype)
