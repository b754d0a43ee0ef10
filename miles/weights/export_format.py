"""Formats in which the trainer's tensors are exported to the engines: unchanged, or quantised.

A quantised format makes several tensors of one, such as values and scales. Manifests, transports and
`check_weight_update_equal` see only the exported names and bytes, so an engine must serve tensors of those names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Entry = tuple[str, "torch.dtype", tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class ExportFormat(Protocol):
    """Converts one tensor into those that engines get. Deterministic, and the same on every rank."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """The layout of what `convert` returns for a tensor of this dtype and shape; at least one entry."""

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """The exported tensors, in the order of `layout`, on the device of `tensor`."""


class AsTrained:
    """Tensors exported unchanged."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """One tensor, the same."""
        return ((name, dtype, shape),)

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """One tensor, the same."""
        return ((name, tensor),)


AS_TRAINED: ExportFormat = AsTrained()


def formatted_layout(export_format: ExportFormat, layout: Iterable[Entry]) -> list[Entry]:
    """The layout of the exported tensors."""
    return [entry for name, dtype, shape in layout for entry in export_format.layout(name, dtype, shape)]


def formatted(
    export_format: ExportFormat, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The exported tensors, one after the other, converted as they are read."""
    for name, tensor in tensors:
        yield from export_format.convert(name, tensor)
