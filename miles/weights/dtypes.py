"""Element types on the wire and in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.rpc.gen import sample_pb2

if TYPE_CHECKING:
    from miles.rpc.gen.sample_pb2 import DType

TORCH_DTYPE: dict[int, torch.dtype] = {
    sample_pb2.DTYPE_UINT8: torch.uint8,
    sample_pb2.DTYPE_UINT16: torch.uint16,
    sample_pb2.DTYPE_INT32: torch.int32,
    sample_pb2.DTYPE_INT64: torch.int64,
    sample_pb2.DTYPE_FLOAT32: torch.float32,
    sample_pb2.DTYPE_FLOAT16: torch.float16,
    sample_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    sample_pb2.DTYPE_FLOAT8_E4M3: torch.float8_e4m3fn,
    sample_pb2.DTYPE_FLOAT64: torch.float64,
    sample_pb2.DTYPE_INT8: torch.int8,
    sample_pb2.DTYPE_BOOL: torch.bool,
}

_WIRE_DTYPE: dict[torch.dtype, DType.ValueType] = {dtype: number for number, dtype in TORCH_DTYPE.items()}  # type: ignore[misc]


def wire_dtype(dtype: torch.dtype) -> DType.ValueType:
    """The DType of a torch dtype; raises ValueError for one that has none."""
    if dtype not in _WIRE_DTYPE:
        raise ValueError(f"{dtype} cannot be sent; convert to one of {sorted(map(str, _WIRE_DTYPE))}")
    return _WIRE_DTYPE[dtype]
