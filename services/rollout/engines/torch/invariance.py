"""Checks that this machine's matrix library computes a row the same way whatever the rows beside it.

A response must not depend on the requests that happen to run beside it, and a key recomputed with a whole prompt must
equal the one computed token by token. Both follow if each row of a matmul is independent of the number of rows. Matrix
libraries choose kernels by shape, so that holds only from some number of rows on; the engine pads up to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from miles.services.rollout.engines.torch.forward import MIN_ROWS
from miles.services.rollout.engines.torch.model import ModelShape

_QUERY_CANDIDATES = (1, 4, 8, 16)
_ROWS = (16, 17, 23, 31, 32, 48, 63, 64, 100, 128, 200, 256, 300)


def min_query_rows(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> int | None:
    """The fewest query rows from which attention treats a row the same at any number of rows; None if 16 do not."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    batch, most, length, written = 2, 96, 256, 50
    query_BMD, keys_BDT, values_BTD = (
        random(batch, most, shape.head_dim),
        random(batch, shape.head_dim, length),
        random(batch, length, shape.head_dim),
    )
    mask_T = torch.zeros(length, dtype=dtype, device=device)
    mask_T[written:] = -torch.inf

    def attend(rows: int, positions: int) -> torch.Tensor:
        scores = torch.add(mask_T[:positions], torch.matmul(query_BMD[:, :rows], keys_BDT[..., :positions]), alpha=0.1)
        return torch.matmul(scores.softmax(-1), values_BTD[:, :positions])

    reference = attend(most, length)

    def independent(rows: int) -> bool:
        return all(torch.equal(attend(rows, positions), reference[:, :rows]) for positions in (64, 128, 192, 256))

    sizes = [rows for rows in range(1, 41) if independent(rows)]
    for candidate in _QUERY_CANDIDATES:
        if all(rows in sizes for rows in range(candidate, 41)):
            return candidate
    return None


def dependent_shapes(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.linear,
) -> list[str]:
    """Linear layers, as "inputs x outputs", whose rows depend on how many there are; empty when all is well."""
    generator = torch.Generator().manual_seed(0)
    faults = []
    sizes = {
        (shape.hidden_size, shape.heads * shape.head_dim),
        (shape.hidden_size, shape.kv_heads * shape.head_dim),
        (shape.heads * shape.head_dim, shape.hidden_size),
        (shape.hidden_size, 4 * shape.hidden_size),
        (4 * shape.hidden_size, shape.hidden_size),
        (shape.hidden_size, min(shape.vocabulary, 4096)),
    }
    for inputs, outputs in sorted(sizes):
        rows_MI = torch.randn(max(_ROWS), inputs, generator=generator).to(device, dtype)
        weight_OI = torch.randn(outputs, inputs, generator=generator).to(device, dtype)
        reference = linear(rows_MI, weight_OI)
        for rows in _ROWS:
            assert rows >= MIN_ROWS
            if not torch.equal(linear(rows_MI[:rows], weight_OI), reference[:rows]):
                faults.append(f"{inputs} x {outputs}")
                break
    return faults
