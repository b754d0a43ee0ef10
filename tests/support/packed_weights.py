"""INT4 matrices beside compressed-tensors' own code: prints as JSON what is equal to the bit.

Runs in an environment that has compressed-tensors; needs PyTorch besides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from format_cases import matrices, same

from miles.precision.int4 import Int4


def comparisons(device: str) -> dict[str, bool]:
    """By what is compared and of which matrices, whether it is equal."""
    return {f"{what}, {dtype}, {case}": equal for dtype, case, what, equal in _compared(device)}


def _compared(device: str) -> Iterator[tuple[torch.dtype, str, str, bool]]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize

    form = Int4(32)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    for dtype in (torch.float32, torch.bfloat16):
        for case, weight in matrices((24, 160), dtype):
            weight = weight.to(device)
            parts = form.quantise(weight)
            packed, scales = parts["_packed"], parts["_scale"]
            values = unpack_from_int32(packed, 4, weight.shape)
            yield dtype, case, "packed", torch.equal(pack_to_int32(values, 4), packed)
            theirs = PackedQuantizationCompressor.decompress({f"weight{k}": v for k, v in parts.items()}, scheme)
            yield dtype, case, "decompressed", same(theirs["weight"] + 0.0, form.dequantise(parts, dtype))
            if dtype == torch.float32:  # they divide in the weight's type
                found = quantize(weight, scales, torch.zeros_like(scales), arguments, torch.int8)
                yield dtype, case, "quantised", torch.equal(found, values)


if __name__ == "__main__":
    json.dump(comparisons("cpu"), sys.stdout)
