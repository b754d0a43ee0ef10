"""Weights on their way into a server: many tensors in one flat buffer, described in SGLang's own format.

SGLang takes tensors as a pickle of torch's multiprocessing reductions: handles of shared memory, not bytes. The pickle
goes only from this process to its server on the same host, which reads it with an unpickler that knows a list of types.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import types
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler

import torch

NamedTensor = tuple[str, torch.Tensor]

_ALIGNMENT = 64
FORMAT = "flattened_bucket"
"""What SGLang calls this format."""


def in_buckets(tensors: Iterable[NamedTensor], limit_bytes: int) -> Iterator[list[NamedTensor]]:
    """Consecutive tensors, as many at a time as fit the limit; one that exceeds it comes alone."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors copied one after the other into a buffer that other processes can map."""

    flat: torch.Tensor
    """uint8, on the device of the tensors."""
    entries: Sequence[types.SimpleNamespace]
    """Where each tensor lies: name, shape, dtype, start_idx, end_idx, numel (bytes), as SGLang reads them."""

    def serialized(self) -> str:
        """One reader's handle of the buffer. Each reader needs its own, and the bucket must outlive their reading."""
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump({"flattened_tensor": self.flat, "metadata": list(self.entries)})
        return base64.b64encode(buffer.getbuffer()).decode()


def flatten(tensors: Sequence[NamedTensor]) -> Bucket:
    """Copy tensors, all on one device, into a new buffer there."""
    entries = []
    end = 0
    for name, tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.nbytes
        entries.append(
            types.SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=tensor.nbytes
            )
        )
    flat = torch.empty(max(end, 1), dtype=torch.uint8, device=tensors[0][1].device)
    if not flat.is_cuda:
        flat.share_memory_()  # type: ignore[no-untyped-call]
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        if tensor.nbytes:
            view = flat[entry.start_idx : entry.end_idx].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.detach())
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()
    return Bucket(flat, entries)


def share_by_name() -> None:
    """Have torch hand CPU memory to other processes by file name, which a process that is no child can open too."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
