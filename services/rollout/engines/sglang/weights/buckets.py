"""Buckets: many tensors in one flat buffer that a server maps, described in SGLang's own format.

SGLang takes tensors as a pickle of torch's multiprocessing reductions: handles of shared memory, not bytes. The pickle
goes only from this process to its server on the same host, whose unpickler accepts a fixed list of types.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler

import torch

from miles.weights.bucketing import buckets
from miles.weights.manifest import offsets
from miles.weights.staging.to_device import Parts, host_bytes

NamedTensor = tuple[str, torch.Tensor]

FORMAT = "flattened_bucket"
"""What SGLang calls this format."""


def in_buckets(tensors: Iterable[NamedTensor], limit_bytes: int) -> Iterator[list[NamedTensor]]:
    """Split into lists as `buckets` does."""
    for members in buckets((_Member(name, tensor) for name, tensor in tensors), limit_bytes):
        yield [(member.name, member.tensor) for member in members]


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    name: str
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors in one buffer that other processes can map."""

    flat: torch.Tensor
    """uint8, on the device of the tensors."""
    entries: Sequence[types.SimpleNamespace]
    """Position of each tensor: name, shape, dtype, start_idx, end_idx, numel (bytes), as SGLang reads them."""
    in_place: bool
    """Whether the buffer is the tensors' own memory, and no copy."""

    def serialized(self) -> str:
        """One reader's handle of the buffer. Each reader needs its own, and the bucket must outlive their reading."""
        return serialized({"flattened_tensor": self.flat, "metadata": list(self.entries)})


def serialized(value: object) -> str:
    """As SGLang takes it."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return base64.b64encode(buffer.getbuffer()).decode()


def flatten(tensors: Sequence[NamedTensor]) -> Bucket:
    """A buffer of the tensors, which are all on one device: their common allocation on a GPU, else a copy."""
    return _in_common(tensors) or _copied(tensors)


def are_together(tensors: Sequence[NamedTensor]) -> bool:
    """Whether all tensors are in one allocation of a GPU."""
    first = tensors[0][1]
    start = first.untyped_storage().data_ptr()
    return first.is_cuda and all(tensor.untyped_storage().data_ptr() == start for _, tensor in tensors)


def _in_common(tensors: Sequence[NamedTensor]) -> Bucket | None:
    """The tensors in place, if they are in one allocation of a GPU."""
    if not are_together(tensors):
        return None
    storage = tensors[0][1].untyped_storage()
    entries = []
    for name, tensor in tensors:
        start = int(tensor.storage_offset()) * tensor.element_size()
        if not tensor.is_contiguous():
            return None
        entries.append(_entry(name, tensor, start))
    flat = torch.empty(0, dtype=torch.uint8, device=tensors[0][1].device).set_(storage)
    return Bucket(flat, entries, in_place=True)


def _copied(tensors: Sequence[NamedTensor]) -> Bucket:
    entries, nbytes = _arranged(tensors)
    flat = torch.empty(nbytes, dtype=torch.uint8, device=tensors[0][1].device)
    if not flat.is_cuda:
        flat.share_memory_()  # type: ignore[no-untyped-call]
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        if tensor.nbytes:
            view = flat[entry.start_idx : entry.end_idx].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.detach())
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()
    return Bucket(flat, entries, in_place=False)


def flatten_to(
    device: torch.device, tensors: Sequence[NamedTensor], fill: Callable[[torch.Tensor, Parts], None]
) -> Bucket:
    """A buffer on a device of tensors in host memory, which `fill` copies there.

    The buffer may be dropped once its readers have answered. Torch keeps the memory of what it handed over until they
    have let go of it, and letting go waits until their copies are done.
    """
    entries, nbytes = _arranged(tensors)
    flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    fill(flat, [(entry.start_idx, host_bytes(tensor)) for entry, (_, tensor) in zip(entries, tensors, strict=True)])
    return Bucket(flat, entries, in_place=False)


def _arranged(tensors: Sequence[NamedTensor]) -> tuple[list[types.SimpleNamespace], int]:
    """Positions of tensors one after the other, and the bytes of a buffer for them."""
    starts, end = offsets(tensor.nbytes for _, tensor in tensors)
    entries = [_entry(name, tensor, start) for (name, tensor), start in zip(tensors, starts, strict=True)]
    return entries, max(end, 1)


def _entry(name: str, tensor: torch.Tensor, start: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=name,
        shape=tuple(tensor.shape),  # torch.Size takes as long to pickle as all the rest
        dtype=tensor.dtype,
        start_idx=start,
        end_idx=start + tensor.nbytes,
        numel=tensor.nbytes,
    )


def share_by_name() -> None:
    """Have torch share CPU memory by file name, which also processes that are no children can open."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
