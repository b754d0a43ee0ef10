"""What becomes of the trainer's tensors on their way to the engines: nothing, or a form that the engines serve.

A quantised form makes several tensors of one, say the values and their scales. The names and bytes that come out are
what manifests, transports and `check_weight_update_equal` see, so an engine must serve tensors of those names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Entry = tuple[str, "torch.dtype", tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class ExportFormat(Protocol):
    """Turns one tensor into those that engines get; the same every time, on every rank."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """What `convert` makes of a tensor like this, without the tensor; at least one entry."""

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """The tensors that `layout` announced, in its order, on the device that the tensor is on."""


class AsTrained:
    """The tensors as they are."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """One tensor, the same."""
        return ((name, dtype, shape),)

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """One tensor, the same."""
        return ((name, tensor),)


AS_TRAINED: ExportFormat = AsTrained()


def formatted_layout(export_format: ExportFormat, layout: Iterable[Entry]) -> list[Entry]:
    """The layout of what leaves the trainer."""
    return [entry for name, dtype, shape in layout for entry in export_format.layout(name, dtype, shape)]


def formatted(
    export_format: ExportFormat, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What leaves the trainer, one tensor after the other as they come."""
    for name, tensor in tensors:
        yield from export_format.convert(name, tensor)
