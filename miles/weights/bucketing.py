"""Buckets: consecutive tensors of a version that are exported and sent together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from miles.weights.manifest import ManifestError

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen import policy_pb2


class Sized(Protocol):
    """A tensor descriptor, or anything else with a name and a size in bytes."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""


S = TypeVar("S", bound=Sized)

_LOADED_TOGETHER = re.compile(r"(.+)\.(?:q_a_proj|q_a_layernorm|q_b_proj|kv_a_proj_with_mqa)\.")
"""The two low-rank projections of latent attention (DeepSeek-V3) and what lies between them. SGLang joins them in one
parameter, for which it needs both in one call, and silently leaves the old weights when it gets one alone."""


def buckets(tensors: Iterable[S], bucket_bytes: int) -> Iterator[list[S]]:
    """Split tensors into consecutive lists of at most `bucket_bytes` each; a larger tensor gets a list of its own.

    Neighbours that engines load together stay in one list, whatever their size.
    """
    bucket: list[S] = []
    size = 0
    attention = None
    for tensor in tensors:
        match = _LOADED_TOGETHER.match(tensor.name)
        previous, attention = attention, None if match is None else match[1]
        if bucket and size + tensor.nbytes > bucket_bytes and (attention is None or attention != previous):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def match_layout(
    descriptors: Sequence[policy_pb2.TensorDescriptor], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[policy_pb2.TensorDescriptor, torch.Tensor]]:
    """Pair each descriptor with its tensor; raise ManifestError where the export differs from its layout."""
    source = iter(tensors)
    for descriptor in descriptors:
        name, tensor = next(source, ("", None))
        if tensor is None:
            raise ManifestError(f"the export ended before tensor {descriptor.name!r} of its layout")
        if name != descriptor.name or tuple(tensor.shape) != tuple(descriptor.shape):
            raise ManifestError(
                f"the export yields {name!r} {tuple(tensor.shape)} where its layout has {descriptor.name!r} "
                f"{tuple(descriptor.shape)}"
            )
        yield descriptor, tensor.detach()
    check_exhausted(source)


def check_exhausted(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Raise ManifestError if an export yields more tensors than its layout has."""
    extra, _ = next(tensors, ("", None))
    if extra:
        raise ManifestError(f"the export yields {extra!r} after the last tensor of its layout")
