"""Bytes between ranks over gloo, sent from where they lie and received where they stay."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist


def as_tensor(data: bytes | memoryview | npt.NDArray[Any]) -> torch.Tensor:
    """View bytes, or an array that has no gaps, as uint8 [nbytes]; to be read only."""
    flat = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch has no tensors that cannot be written
        return torch.from_numpy(flat)


def broadcast_bytes(data: bytes, group: dist.ProcessGroup) -> bytes:
    """Rank 0's bytes on every rank of the default process group; collective."""
    is_sender = dist.get_rank() == 0
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0, group=group)
    if not int(size):
        return b""
    buffer = as_tensor(data) if is_sender else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, src=0, group=group)
    return data if is_sender else buffer.numpy().tobytes()
