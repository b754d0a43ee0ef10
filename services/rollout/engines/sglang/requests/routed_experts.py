"""Routed experts: which experts each token was routed to, as SGLang reports it."""

from __future__ import annotations

import binascii
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.services.rollout.engines.base import EngineFailed
from miles.types.experts import ExpertLayout

_SLICE_BYTES = 1 << 18


def decode_experts(encoded: str, layout: ExpertLayout, rows: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Decode base64 of int32 (rows, layers, top_k) to uint8 or uint16 (rows, moe_layers, top_k).

    Decodes in slices: the int32 of a long response would be large, and one call for all of it would keep other threads
    from running. Raises EngineFailed when the length is wrong or an expert does not exist.
    """
    row_bytes = layout.layers * layout.top_k * 4
    expected = 4 * -(-rows * row_bytes // 3)
    if len(encoded) != expected:
        raise EngineFailed(
            f"SGLang sent {len(encoded)} characters of expert numbers; {rows} tokens × {layout.layers} layers × "
            f"{layout.top_k} experts are {expected}"
        )
    chosen = slice(None) if len(layout.moe_layers) == layout.layers else list(layout.moe_layers)
    decoded = np.empty((rows, len(layout.moe_layers), layout.top_k), layout.dtype)
    step = 3 * max(1, _SLICE_BYTES // (3 * row_bytes))  # rows whose bytes end where a group of base64 ends
    for start in range(0, rows, step):
        end = min(start + step, rows)
        text = encoded[start * row_bytes // 3 * 4 : start * row_bytes // 3 * 4 + 4 * -(-(end - start) * row_bytes // 3)]
        try:
            wide = np.frombuffer(binascii.a2b_base64(text, strict_mode=True), np.int32)
        except ValueError as error:
            raise EngineFailed(f"SGLang sent expert numbers that are no base64 of int32: {error}") from error
        part = wide.reshape(end - start, layout.layers, layout.top_k)[:, chosen]
        if part.size and (part.min() < 0 or part.max() >= layout.experts):
            raise EngineFailed(
                f"SGLang sent expert numbers from {part.min()} to {part.max()}; the model has {layout.experts}"
            )
        decoded[start:end] = part
    return decoded
